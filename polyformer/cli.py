"""The `polyformer` command. Each command works on files, so that client and server can be two machines:

    data owner                                         server
    ----------                                         ------
    train (or adopt a released checkpoint)
    convert -> export -> compile           ── model.circuit ─▶  serve model.circuit
    keygen model.client                    ── evaluation keys ─▶  (evaluate --keys uploads them)
    encrypt ─▶ request.bin
    evaluate request.bin --url ...         ── ciphertexts ──▶  evaluates
    decrypt reply.bin                      ◀─ ciphertexts ──

`infer` is encrypt, evaluate and decrypt in one; `generate` does that for one token after the other, with a circuit that was
exported with `--step`; `demo` is all of it on this machine. This file only lists the commands
and turns what goes wrong into a paragraph and an exit code: 1 for a failure, 2 for wrong usage, 130 for Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from polyformer.commands import bench, compiling, demo, generate, infer, inspecting, keys, models, reporting, serving
from polyformer.commands.console import Failure, error_paragraph

INTERRUPTED = 130

app = typer.Typer(
    name="polyformer",
    help="Inference on encrypted data: train, export, compile, and let a server evaluate what it cannot read.",
    epilog="Any command takes --debug: a full traceback instead of a sentence. Start with: polyformer demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
models.register(app)
compiling.register(app)
keys.register(app)
serving.register(app)
infer.register(app)
generate.register(app)
reporting.register(app)
inspecting.register(app)
bench.register(app)
demo.register(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code."""
    debug = "--debug" in arguments or bool(os.environ.get("POLYFORMER_DEBUG"))
    try:
        result = app(args=[a for a in arguments if a != "--debug"], standalone_mode=False, prog_name="polyformer")
        code = result if isinstance(result, int) else 0
    except typer.Exit as stop:
        code = int(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong usage; the class depends on Typer's version
            error.show()
            return int(error.exit_code)
        if debug:
            raise
        error_paragraph(*explain(error))
        return 1
    if code == INTERRUPTED:  # Typer catches Ctrl-C itself and gives this code
        error_paragraph("interrupted")
    return code


def explain(error: Exception) -> tuple[str, str]:
    """What went wrong, and what to do next."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, Failure):
        return text, ""
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{error.name} is not installed, and this command needs it.",
            "Install everything with: pip install 'polyformer[all]'",
        )
    from he_backend.base import HEError

    if isinstance(error, (HEError, OSError, ValueError)):
        return f"{type(error).__name__}: {text}", ""
    return (
        f"{type(error).__name__}: {text}",
        "This was not foreseen; run the command again with --debug and report what it shows.",
    )


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))
