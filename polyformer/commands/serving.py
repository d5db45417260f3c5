"""serve: evaluate one circuit for whoever holds its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from polyformer.commands.console import Failure, must_exist, say, size, warn_insecure
from polyformer.commands.options import THREADS, Insecure

PLAINTEXT_GB = 4.0  # for weights, where a circuit does not say what its plan keeps
STATE_GB = 4.3


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Server", epilog="Example: polyformer serve model.circuit --folder server --port 8000")(
        serve
    )


def serve(
    circuit: Annotated[Path, typer.Argument(help="Circuit file, from `polyformer compile`.")],
    folder: Annotated[Path, typer.Option(help="Where uploaded keys are kept; must hold no secret key.")] = Path(
        "server"
    ),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    threads: Annotated[int, typer.Option(min=1, help="Primitives evaluated at once.")] = THREADS,
    plaintext_gb: Annotated[
        float | None,
        typer.Option(min=0, help="Memory for weights encoded ahead; default: what the circuit's plan keeps."),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait or run.")] = 4,
    max_sessions: Annotated[int, typer.Option(min=1, help="Sequences whose keys and values are kept at once.")] = 8,
    state_gb: Annotated[float, typer.Option(min=0, help="Memory for the keys and values of all sequences.")] = STATE_GB,
    insecure: Insecure = False,
) -> None:
    """Serve a circuit over HTTP. It never sees a secret key, and refuses to start beside one."""
    from he_backend.base import ManifestError
    from he_backend.circuit import Circuit
    from he_backend.server import Limits, Server, ensure_environment, refuse_secrets
    from he_backend.server import serve as run

    must_exist(circuit, "polyformer compile")
    ensure_environment()
    refuse_secrets(folder)
    from he_backend.engine import CircuitEngine

    loaded = Circuit.load(circuit)
    if loaded.params.insecure:
        warn_insecure(loaded.params.name)
    planned = loaded.predicted.get("plaintext_bytes", PLAINTEXT_GB * 1e9)
    budget = int(planned if plaintext_gb is None else plaintext_gb * 1e9)
    engine = CircuitEngine(loaded, threads=threads, plaintext_budget=budget, allow_insecure=insecure)
    limits = Limits(max_queue=max_queue, max_sessions=max_sessions, max_state_bytes=int(state_gb * 1e9))
    try:
        server = Server(loaded, engine, folder, limits=limits)
    except ManifestError as error:
        raise Failure(
            f"{folder} holds keys for another circuit: give this one a folder of its own with --folder"
        ) from error
    say(f"serving {loaded.params.name} on http://{host}:{port}; keys in {folder}; Ctrl-C ends")
    if loaded.steps:  # the plan has room for one
        states = f"{server.sessions.most} sequences at once, {size(loaded.state_bytes)} each"
        say(f"{states}; all but the first are beside the plan's memory (--max-sessions, --state-gb)")
    run(server, host=host, port=port)
