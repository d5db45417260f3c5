"""keygen: the client's secret key, and the evaluation keys that one circuit needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from polyformer.commands.console import bar, emit, must_exist, say, size, warn_insecure
from polyformer.commands.options import Insecure, Json, Spec


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Client", epilog="Example: polyformer keygen runs/mine/model.client --out keys")(keygen)


def keygen(
    client: Spec,
    out: Annotated[Path, typer.Option(help="Folder for secret/ (stays here) and evaluation/ (goes to the server).")],
    insecure: Insecure = False,
    json: Json = False,
) -> None:
    """Make keys for a circuit; interrupted, it goes on where it stopped."""
    result = make_keys(client, out, insecure=insecure)
    if json:
        emit(result)
    say(f"{out}: {result['files']} evaluation keys, {size(result['bytes'])}; the secret key is in {out / 'secret'}")


def make_keys(client: Path, out: Path, *, insecure: bool) -> dict[str, Any]:
    """Generate with a progress bar; what was made."""
    from he_backend import keys
    from he_backend.circuit import ClientSpec

    spec = ClientSpec.load(must_exist(client, "polyformer compile"))
    if spec.params.insecure:
        warn_insecure(spec.params.name)
    with bar("keys") as advance:
        manifest = keys.generate(spec, out, progress=advance, allow_insecure=insecure)
    return {
        "folder": str(out),
        "key_id": manifest.key_id,
        "circuit_sha256": manifest.circuit_sha256,
        "files": len(manifest.files),
        "bytes": sum(f.bytes for f in manifest.files),
        "insecure": spec.params.insecure,
    }
