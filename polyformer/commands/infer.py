"""encrypt, evaluate, decrypt, and infer, which is all three: the client's side of a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyformer.commands.console import (
    Advance,
    Failure,
    bar,
    emit,
    load_array,
    must_exist,
    out,
    say,
    size,
    warn_insecure,
)
from polyformer.commands.options import LOCAL, Json, Keys, Spec, TokenIds, Tokenizer, Url, Wait
from polyformer.reading import Reading

if TYPE_CHECKING:
    import numpy as np

    from he_backend.circuit import ClientSpec
    from he_backend.engine import KeyOwner
    from he_backend.owner import Opened

Text = Annotated[str | None, typer.Option(help="Prompt; its last tokens are used, or it is padded on the left.")]
Tensor = Annotated[Path | None, typer.Option(help=".npy with the input tensor, for circuits without an embedding.")]
Save = Annotated[Path | None, typer.Option(help=".npy for the whole output tensor, rounded.")]
Top = Annotated[int, typer.Option(min=1, help="How many tokens to show.")]
TOP = 5


def register(app: typer.Typer) -> None:
    def command(example: str) -> Any:
        return app.command(rich_help_panel="Client", epilog=f"Example: polyformer {example}")

    command('encrypt model.client --keys keys --text "My fellow" --out request.bin')(encrypt)
    command("evaluate model.client request.bin --keys keys --url http://host:8000 --out reply.bin")(evaluate)
    command("decrypt model.client reply.bin --keys keys")(decrypt)
    command('infer model.client --keys keys --url http://host:8000 --text "My fellow"')(infer)


def encrypt(
    client: Spec,
    keys: Keys,
    to: Annotated[Path, typer.Option("--out", help="File for the encrypted request.")],
    text: Text = None,
    tokens: TokenIds = None,
    tensor: Tensor = None,
    tokenizer: Tokenizer = None,
    json: Json = False,
) -> None:
    """Encrypt a prompt into a file."""
    from he_backend import owner

    spec, who = open_keys(client, keys)
    data = owner.seal(spec, who, read_input(spec, client, text, tokens, tensor, tokenizer))
    to.write_bytes(data)
    if json:
        emit({"request": str(to), "bytes": len(data), "key_id": who.key_id, "insecure": spec.params.insecure})
    say(f"{to}: {size(len(data))}, encrypted")


def evaluate(
    client: Spec,
    request: Annotated[Path, typer.Argument(help="Encrypted request, from `polyformer encrypt`.")],
    keys: Keys,
    to: Annotated[Path, typer.Option("--out", help="File for the encrypted reply.")],
    url: Url = LOCAL,
    wait: Wait = 0.0,
    json: Json = False,
) -> None:
    """Have the server evaluate an encrypted request; evaluation keys that it lacks are uploaded first."""
    spec = load_spec(client)
    reply, timing = ask(spec, must_exist(request, "polyformer encrypt").read_bytes(), keys, url, wait=wait)
    to.write_bytes(reply)
    if json:
        emit({"reply": str(to), "bytes": len(reply), "timing": timing, "insecure": spec.params.insecure})
    say(f"{to}: {size(len(reply))}, evaluated in {timing.get('wall_s', 0):.1f} s")


def decrypt(
    client: Spec,
    reply: Annotated[Path, typer.Argument(help="Encrypted reply, from `polyformer evaluate`.")],
    keys: Keys,
    save: Save = None,
    tokenizer: Tokenizer = None,
    top: Top = TOP,
    json: Json = False,
) -> None:
    """Decrypt a reply and show the likeliest next tokens."""
    spec, who = open_keys(client, keys)
    opened = open_reply(spec, who, must_exist(reply, "polyformer evaluate").read_bytes())
    show(spec, opened, client, tokenizer, top, save, json)


def infer(
    client: Spec,
    keys: Keys,
    url: Url = LOCAL,
    wait: Wait = 0.0,
    text: Text = None,
    tokens: TokenIds = None,
    tensor: Tensor = None,
    tokenizer: Tokenizer = None,
    save: Save = None,
    top: Top = TOP,
    json: Json = False,
) -> None:
    """Encrypt, evaluate on a server, decrypt. Keys that the server lacks are uploaded first."""
    from he_backend import owner

    spec, who = open_keys(client, keys)
    request = owner.seal(spec, who, read_input(spec, client, text, tokens, tensor, tokenizer))
    reply, _ = ask(spec, request, keys, url, wait=wait, moduli=who.moduli)
    show(spec, open_reply(spec, who, reply), client, tokenizer, top, save, json)


# --- The steps, which the demo uses too -------------------------------------------------------------------------------


def load_spec(client: Path) -> ClientSpec:
    from he_backend.circuit import ClientSpec

    spec = ClientSpec.load(must_exist(client, "polyformer compile"))
    if spec.params.insecure:
        warn_insecure(spec.params.name)
    return spec


def open_keys(client: Path, keys: Path) -> tuple[ClientSpec, KeyOwner]:
    """Specification, and the owner of the secret key for it."""
    spec = load_spec(client)
    return spec, open_owner(spec, client, keys)


def open_owner(spec: ClientSpec, client: Path, keys: Path) -> KeyOwner:
    """The owner of the secret key in a folder that `keygen` made."""
    from he_backend.engine import KeyOwner

    must_exist(keys / "secret", f"polyformer keygen {client}")
    return KeyOwner(spec, keys, allow_insecure=spec.params.insecure)


def read_input(
    spec: ClientSpec,
    client: Path,
    text: str | None,
    tokens: str | None,
    tensor: Path | None,
    tokenizer: Path | None,
) -> Mapping[str, np.ndarray]:
    """The circuit's input tensor, from whichever of the three was given.

    Raises:
        Failure: none, or more than one.
    """
    import numpy as np

    from he_backend import owner

    if sum(x is not None for x in (text, tokens, tensor)) != 1:
        raise Failure("give exactly one of --text, --tokens and --tensor")
    if tensor is not None:
        values = load_array(must_exist(tensor, "numpy.save"))
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
            raise Failure(f"{tensor} is not one array of real numbers; save it with numpy.save")
        return {spec.inputs[0].name: values.astype(np.float64)}
    if tokens is not None:
        return owner.embed(spec, np.array([int(t) for t in tokens.replace(",", " ").split()], dtype=np.int64))
    words = load_tokenizer(client, tokenizer)
    assert text is not None
    return owner.embed(
        spec, np.array(Reading.of(spec.model).read(words, text, spec.inputs[0].shape[0]), dtype=np.int64)
    )


def load_tokenizer(client: Path, tokenizer: Path | None) -> Any:
    """A Hugging Face tokenizer, from a file beside the specification unless another is named."""
    import tokenizers

    path = must_exist(tokenizer or client.with_name("tokenizer.json"), "polyformer train")
    return tokenizers.Tokenizer.from_file(str(path))


def ask(
    spec: ClientSpec, request: bytes, keys: Path, url: str, *, wait: float, moduli: tuple[int, ...] | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Compare manifests, upload what is missing, evaluate with progress. Needs no secret key."""
    from he_backend.client import Client

    with Client(url) as client:
        client.wait_answer(wait)
        client.agree(spec, moduli)
        upload(client, keys)
        with evaluation_bar() as progress:
            return client.evaluate(request, max_reply=reply_cap(spec), progress=progress)


def upload(client: Any, keys: Path, *, discard: bool = False) -> int:
    """Send evaluation keys, then wait until the server is ready; bytes of the bundle."""
    from he_backend.keys import read_manifest

    if keys.name == "evaluation" and not (keys / "evaluation").exists():
        keys = keys.parent  # the folder of the bundle was meant
    manifest = read_manifest(must_exist(keys, "polyformer keygen"))
    with bar("upload") as advance:
        client.upload(
            manifest, keys / "evaluation", lambda done, total: advance(done, total, size(total)), discard=discard
        )
    with bar("server") as advance:
        client.wait_ready(
            lambda status: advance(status["weights"]["done"], status["weights"]["total"], "encoding weights")
        )
    return sum(f.bytes for f in manifest.files)


def reply_cap(spec: ClientSpec) -> int:
    """No honest reply is longer than this: 8 bytes a residue and a header."""
    return (1 << 20) + sum(spec.params.ciphertext_bytes(s.level) * len(spec.arrays[s.layout]) for s in spec.outputs)


@contextmanager
def evaluation_bar() -> Iterator[Any]:
    """A bar that takes a job's state and shows the ONNX node at work."""
    with bar("evaluate") as advance:
        yield lambda job: progress_of(job, advance)


def progress_of(job: Mapping[str, Any], advance: Advance) -> None:
    advance(int(job["done"]), int(job["total"]), f"{job['done']}/{job['total']} {job['current']}")


def open_reply(spec: ClientSpec, who: KeyOwner, data: bytes) -> Opened:
    from he_backend import owner

    return owner.open_reply(spec, who, data, owner.Counter(who.counter_path))


def show(
    spec: ClientSpec,
    opened: Opened,
    client: Path,
    tokenizer: Path | None,
    top: int,
    save: Path | None,
    json: bool,
) -> None:
    """The likeliest tokens of a language model, or classes of a classifier; the tensor itself for anything else."""
    import numpy as np

    tensor = opened.tensors[spec.outputs[0].name]
    if save is not None:
        np.save(save, tensor)
    classes = Reading.of(spec.model).classes
    if not spec.embedding and not classes:
        if json:
            emit({"output": tensor.tolist(), "insecure": spec.params.insecure})
        else:
            out.print(np.array2string(tensor, precision=4, threshold=64))
        return
    if classes:
        rows = likeliest(tensor, lambda i: classes[i], top, what="class")
    else:
        path = tokenizer or client.with_name("tokenizer.json")
        rows = likeliest(tensor, spelled(load_tokenizer(client, tokenizer) if path.exists() else None), top)
    if json:
        emit({"classes" if classes else "next": rows, "insecure": spec.params.insecure})
        return
    for row in rows:
        said = row["class"] if classes else repr(row["token"])
        out.print(f"{row['probability']:7.1%}  {row['logit']:9.3f}  {said}", markup=False)


def spelled(tokenizer: Any) -> Callable[[int], str]:
    """The text of a token, or its number where there is no tokenizer."""
    return str if tokenizer is None else lambda i: tokenizer.decode([i], skip_special_tokens=False)


def likeliest(logits: np.ndarray, name: Callable[[int], str], top: int, *, what: str = "token") -> list[dict[str, Any]]:
    """The `top` likeliest outputs of the last position: name (under `what`), id, logit, probability."""
    import numpy as np

    last = np.asarray(logits, dtype=np.float64).reshape(-1, logits.shape[-1])[-1]
    weights = np.exp(last - last.max())
    probabilities = weights / weights.sum()
    ids = [int(i) for i in np.argsort(-last, kind="stable")[:top]]
    return [
        {
            what: name(i),
            "id": i,
            "logit": float(last[i]),
            "probability": float(probabilities[i]),
        }
        for i in ids
    ]
