"""Options that several commands have: names, help and defaults stand here alone, as `threads: Threads = THREADS`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BACKEND = "openfhe"
THREADS = 2
MAX_ERROR = 0.01  # the compiler's default
AUTO = "auto"
LOCAL = "http://127.0.0.1:8000"


def known_backend(name: str) -> str:
    from he_backend.base import BACKENDS

    if name not in BACKENDS:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(BACKENDS)}")
    return name


# --- Any command ------------------------------------------------------------------------------------------------------

Json = Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")]
Backend = Annotated[str, typer.Option(callback=known_backend, help="openfhe or tenseal.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the server.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow a test-size ring that protects nothing.")]

# --- Training ---------------------------------------------------------------------------------------------------------

Device = Annotated[str, typer.Option(help="Where torch runs: cpu, cuda, cuda:1; auto is CUDA where there is any.")]

# --- Compiling --------------------------------------------------------------------------------------------------------

Model = Annotated[Path, typer.Argument(help="ONNX file, from `polyformer export`.")]
Calibration = Annotated[
    Path | None, typer.Option(help=".npz with `tokens` [n, T] or `inputs` [n, ...]; default: beside the model.")
]
Memory = Annotated[float | None, typer.Option(help="RAM cap; default: 80 % of this machine's.")]
Latency = Annotated[float | None, typer.Option("--max-latency", help="Most predicted seconds of an evaluation.")]
Error = Annotated[float, typer.Option("--max-error", help="Largest error of an output that may be promised.")]
InsecureRing = Annotated[int | None, typer.Option(min=10, max=17, help="Ring 2^k of any size, INSECURE, for tests.")]
Approximate = Annotated[
    bool, typer.Option("--approximate", help="Fit activations, softmax and norms by polynomials on calibrated ranges.")
]

# --- Asking a server --------------------------------------------------------------------------------------------------

Spec = Annotated[Path, typer.Argument(help="Client specification, from `polyformer compile`.")]
Keys = Annotated[Path, typer.Option(help="Folder of keys, from `polyformer keygen`.")]
TokenIds = Annotated[str | None, typer.Option(help="Token ids instead of text: 5,17,3,...")]
Tokenizer = Annotated[Path | None, typer.Option(help="tokenizer.json; default: beside the specification.")]
Url = Annotated[str, typer.Option(help="Address of the server.")]
Wait = Annotated[float, typer.Option(min=0, help="Seconds to wait for a server that does not answer yet.")]
