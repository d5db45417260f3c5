"""generate: text from an encrypted prompt, one token at a time, with keys and values that the server keeps encrypted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyformer.commands.console import Failure, bar, emit, out, say
from polyformer.commands.infer import load_spec, load_tokenizer, open_owner, open_reply, reply_cap, upload
from polyformer.commands.options import LOCAL, Json, Keys, Spec, TokenIds, Tokenizer, Url, Wait
from polyformer.reading import Reading

if TYPE_CHECKING:
    import numpy as np

    from he_backend.circuit import ClientSpec
    from he_backend.client import Client
    from he_backend.engine import KeyOwner


def register(app: typer.Typer) -> None:
    app.command(
        rich_help_panel="Client",
        epilog='Example: polyformer generate step.client --keys keys --url http://host:8000 --text "My fellow" --tokens 8',
    )(generate)


def generate(
    client: Spec,
    keys: Keys,
    url: Url = LOCAL,
    wait: Wait = 0.0,
    text: Annotated[str | None, typer.Option(help="Prompt; what does not fit the window is cut on the left.")] = None,
    prompt_ids: TokenIds = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate.")] = 8,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above it, tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the draw; default: a new one each time.")] = None,
    tokenizer: Tokenizer = None,
    json: Json = False,
) -> None:
    """Generate text on a server that reads neither the prompt nor the answer. The client picks each token.

    The prompt is fed token by token through the same circuit. Each generated token is one decryption of the key's limit.
    """
    from he_backend.client import Client

    spec = load_spec(client)
    if not spec.steps:
        raise Failure(
            f"{client} is for whole windows; make a step with `polyformer export --step` and compile its step.onnx"
        )
    who = open_owner(spec, client, keys)
    if (text is None) == (prompt_ids is None):
        raise Failure("give exactly one of --text and --prompt-ids")
    words = load_tokenizer(client, tokenizer) if text is not None else None
    given = (prompt_ids or "").replace(",", " ").split()
    marks = Reading.of(spec.model).special
    ids = [int(t) for t in given] if words is None else words.encode(text, add_special_tokens=marks).ids
    prompt = fitted(ids, tokens, spec.steps)
    if len(prompt) < len(ids):
        say(f"the window holds {spec.steps} tokens: the first {len(ids) - len(prompt)} of the prompt are left out")
    with Client(url) as connection:
        connection.wait_answer(wait)
        connection.agree(spec, who.moduli)
        upload(connection, keys)
        with bar("generate") as advance, conversation(spec, who, connection) as sequence:
            total = len(prompt) + tokens - 1
            sequence.report = lambda done, what: advance(done, total, what)
            answer = continued(sequence, prompt, tokens, temperature, seed)
    result = {
        "prompt": prompt,
        "tokens": answer,
        "text": None if words is None else words.decode(prompt + answer),
        "seconds": [round(s, 3) for s in sequence.seconds],
        "evaluate_s": [round(s, 3) for s in sequence.evaluated],
        "decryptions": tokens,
        "insecure": spec.params.insecure,
    }
    if json:
        emit(result)
    else:
        out.print(result["text"] if words is not None else " ".join(map(str, answer)), markup=False)
    new = sequence.evaluated[-tokens:]
    say(f"{sum(new) / len(new):.1f} s a token, of {len(sequence.evaluated)} steps; {tokens} decryptions of this key")


def fitted(ids: list[int], tokens: int, steps: int) -> list[int]:
    """The end of the prompt that leaves room for `tokens` more: the last of them is never fed.

    Raises:
        Failure: there is no prompt, or not even one token of it fits.
    """
    if not ids:
        raise Failure("the prompt is empty; the model continues at least one token")
    room = steps - tokens + 1
    if room < 1:
        raise Failure(f"{tokens} tokens do not fit: the model's window holds {steps}; ask for {steps} at most")
    return ids[-room:]


@dataclass
class Sequence:
    """A session on a server, as the client drives it; seconds a step with everything, and those of the evaluation alone."""

    spec: ClientSpec
    who: KeyOwner
    client: Client
    session: str

    def __post_init__(self) -> None:
        self.fed = 0
        self.seconds: list[float] = []
        self.evaluated: list[float] = []
        self.report: Any = lambda done, what: None

    def feed(self, token: int, *, wanted: bool) -> np.ndarray | None:
        """One more token; the logits [V] of what follows it, rounded, if they are wanted.

        Raises:
            HEError: the server lost the sequence, or its reply is not one to this request.
        """
        import numpy as np

        from he_backend import owner

        start, number = time.monotonic(), self.fed + 1
        request = owner.seal(self.spec, self.who, owner.embed_step(self.spec, token, self.fed))
        reply, timing = self.client.step(
            self.session,
            self.fed,
            request,
            max_reply=reply_cap(self.spec),
            fetch=wanted,
            progress=lambda job: self.report(
                self.fed, f"token {number}: {job['done']}/{job['total']} {job['current']}"
            ),
        )
        self.fed += 1
        self.evaluated.append(float(timing.get("wall_s", 0.0)))
        logits = None
        if wanted:
            logits = np.asarray(open_reply(self.spec, self.who, reply).tensors[self.spec.outputs[0].name]).reshape(-1)
            check_logits(logits, self.spec)
        self.seconds.append(time.monotonic() - start)
        self.report(self.fed, "")
        return logits


@contextmanager
def conversation(spec: ClientSpec, who: KeyOwner, client: Client) -> Iterator[Sequence]:
    """A sequence that the server forgets at the end, however it comes."""
    from he_backend.base import HEError

    session = client.open_session()
    try:
        yield Sequence(spec=spec, who=who, client=client, session=session)
    finally:
        try:
            client.close_session(session)
        except HEError:
            say("the server was not told that the sequence ended; it forgets it after a while")


def continued(sequence: Sequence, prompt: list[int], tokens: int, temperature: float, seed: int | None) -> list[int]:
    """Feed the prompt, then each token that is picked; the picked tokens."""
    import numpy as np

    rng = np.random.default_rng(seed)
    for token in prompt[:-1]:
        sequence.feed(token, wanted=False)
    last, answer = prompt[-1], list[int]()
    for _ in range(tokens):
        logits = sequence.feed(last, wanted=True)
        assert logits is not None
        last = pick(logits, temperature, rng)
        answer.append(last)
    return answer


def pick(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """The likeliest token at temperature 0, else one drawn from softmax(logits / temperature)."""
    import numpy as np

    if temperature == 0.0:
        return int(np.argmax(logits))
    weights = np.exp((logits - logits.max()) / temperature)
    return int(rng.choice(len(logits), p=weights / weights.sum()))


def check_logits(logits: np.ndarray, spec: ClientSpec) -> None:
    """Refuse what an honest server cannot have computed, or a sequence that left the calibrated ranges: its error is not promised.

    Raises:
        Failure: a logit beyond twice the largest one that calibration saw.
    """
    import numpy as np

    largest, most = float(np.abs(logits).max()), 2.0 * spec.outputs[0].bound
    if not largest <= most:
        raise Failure(
            f"a logit of {largest:.4g}, where calibration saw {spec.outputs[0].bound:.4g} at most: the prompt is outside what the "
            "circuit was calibrated for, so that its error bound does not hold"
        )
