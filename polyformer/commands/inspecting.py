"""inspect: what a file or folder is, its sizes, parameters and hash."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from polyformer.commands.console import Failure, emit, out, size, warn_insecure
from polyformer.commands.options import Json


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Look", epilog="Example: polyformer inspect runs/demo/model.circuit")(inspect)


def inspect(
    path: Annotated[
        Path, typer.Argument(help="Circuit, client file, request, reply, ONNX, keys, report, model folder.")
    ],
    json: Json = False,
    ops: Annotated[bool, typer.Option(help="Print a circuit's operators, one a line.")] = False,
) -> None:
    """Say what an artefact is."""
    if not path.exists():
        raise Failure(f"{path} does not exist")
    facts = describe(path)
    if facts.get("insecure"):
        warn_insecure(str(facts.get("name", path)))
    if json:
        emit(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        if name == "certificates":
            for model, certificate in value.items():
                out.print(f"{name:<{width}}  {model}: {certificate}", markup=False, soft_wrap=True)
            continue
        out.print(f"{name:<{width}}  {value}", markup=False, soft_wrap=True)
    if ops and facts["what"] == "circuit":
        from he_backend.circuit import Circuit

        out.print(str(Circuit.load(path)), markup=False, soft_wrap=True)


def describe(path: Path) -> dict[str, Any]:
    """Facts about any artefact of this program.

    Raises:
        Failure: it is none.
    """
    if path.is_dir():
        return folder(path)
    with path.open("rb") as stream:
        start = stream.read(16)
    common = {"bytes": size(path.stat().st_size), "sha256": sha256(path)}
    if start.startswith(b"POLYFHE1"):
        return {**container(path), **common}
    if start.startswith(b"POLYFHE-SECRET"):
        return {"what": "SECRET KEY; it belongs to the client alone", "bytes": common["bytes"]}
    if start.startswith(b"POLYFHE-EVALKEY"):
        return {"what": "evaluation key", **common}
    if path.suffix == ".onnx":
        return {**onnx_model(path), **common}
    if path.suffix == ".json":
        return {**json_file(path), **common}
    raise Failure(f"{path} is no artefact of polyformer: it starts with {start!r}")


def container(path: Path) -> dict[str, Any]:
    """A circuit, a client specification, or a frame."""
    from he_backend import container as file
    from he_backend import efficiency
    from he_backend.circuit import Circuit, ClientSpec

    header, arrays, _ = file.read(path)
    kind = header.get("format")
    facts: dict[str, Any] = {"what": kind}
    if kind in ("circuit", "client-spec"):
        loaded: Any = Circuit.load(path) if kind == "circuit" else ClientSpec.load(path)
        params = loaded.params
        facts |= {
            "name": params.name,
            "insecure": params.insecure,
            "parameters": params.to_json(),
            "log2(QP)": params.log_qp,
            "inputs": [f"{s.name} {list(s.shape)} at level {s.level}" for s in loaded.inputs],
            "outputs": [f"{s.name} {list(s.shape)} at level {s.level}" for s in loaded.outputs],
            "rotation keys": len(loaded.keys),
            "error bound": loaded.error_bound,
            "predicted": dict(loaded.predicted),
            "circuit_sha256": loaded.sha256 if kind == "circuit" else loaded.circuit_sha256,
        }
        if loaded.steps:
            facts["steps"] = f"at most {loaded.steps} a sequence; failure_log2 and error are those of a whole one"
            facts["states"] = [f"{s.name} {list(s.shape)} at level {s.level}" for s in loaded.states]
        if kind == "circuit":
            facts["operators"] = dict(Counter(op.kind for op in loaded.ops))
            if loaded.errors:
                by_node = efficiency.largest([vars(op) for op in loaded.ops], loaded.errors)
                facts["predicted error after"] = {name: float(f"{error:.2g}") for name, error in by_node.items()}
    else:
        facts |= {k: header.get(k) for k in ("circuit_sha256", "key_id", "log_n", "ciphertexts")}
    facts["arrays"] = f"{len(arrays)}, {size(sum(a.nbytes for a in arrays.values()))}"
    return facts


def onnx_model(path: Path) -> dict[str, Any]:
    import onnx

    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's own class, which depends on its version
        raise Failure(f"{path} is not an ONNX file: {type(error).__name__}") from error
    parameters = sum(int(_product(i.dims)) for i in model.graph.initializer)
    return {
        "what": "ONNX model",
        "operators": dict(Counter(node.op_type for node in model.graph.node)),
        "parameters": parameters,
        "inputs": [i.name for i in model.graph.input],
        "outputs": [o.name for o in model.graph.output],
    }


def json_file(path: Path) -> dict[str, Any]:
    import json

    data = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(data, dict) and data.get("format") == "polyformer-keys":
        return {"what": "manifest of evaluation keys", "key_id": data["key_id"], "files": len(data["files"])}
    if isinstance(data, dict) and data.get("format") == "polyformer-report":
        return {"what": "report", "insecure": data["insecure"], "created": data["created"], **data["measured"]}
    if isinstance(data, dict) and {"name", "metrics", "machine"} <= set(data):
        return {"what": "benchmark record", "name": data["name"], "created": data["created"], **data["metrics"]}
    raise Failure(f"{path} is JSON, but nothing that polyformer wrote")


def folder(path: Path) -> dict[str, Any]:
    """A folder of keys or of a model."""
    total = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    if (path / "evaluation" / "manifest.json").exists() or (path / "manifest.json").exists():
        from he_backend.keys import find_secret, read_manifest

        manifest = read_manifest(path)
        return {
            "what": "keys",
            "secret key": "yes: a client's folder" if find_secret(path) else "no: fit for a server",
            "key_id": manifest.key_id,
            "name": manifest.params.name,
            "insecure": manifest.params.insecure,
            "circuit_sha256": manifest.circuit_sha256,
            "files": len(manifest.files),
            "bytes": size(total),
        }
    if (path / "config.json").exists():
        import json

        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        stages = sorted(p.stem for p in path.glob("*.safetensors") if p.stem not in ("tokens", "examples"))
        return {
            "what": "model folder",
            "models": stages,
            "recipe": config.get("recipe"),
            "certificates": certificates(path, [name for name in stages if name in config.get("models", {})]),
            "bytes": size(total),
        }
    raise Failure(f"{path} is neither a folder of keys nor of a model")


def certificates(path: Path, names: list[str]) -> dict[str, str]:
    """Each model of a folder as a polynomial of its embedded input: its exact degree, or what is in the way."""
    try:
        from polyformer.certificate import certify
        from training import load_model
    except ModuleNotFoundError as error:
        return dict.fromkeys(names, f"not computed: {error.name} is not installed")
    return {name: str(certify(load_model(path, name))) for name in names}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _product(numbers: Any) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result
