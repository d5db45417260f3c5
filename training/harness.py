"""EleutherAI's lm-evaluation-harness over our language models: `loglikelihood`, `loglikelihood_rolling`, `generate_until`.

    from lm_eval import simple_evaluate
    from training.harness import harness_model
    simple_evaluate(model=harness_model(model, tokenizer, prefix=0), tasks=["lambada_openai"])

`Harness` needs nothing but the model and its tokenizer; `harness_model` adds lm_eval's base class, which
`simple_evaluate` asks for, and so needs the extra `eval`. Interface: lm_eval 0.4, `lm_eval/api/model.py`, class LM. A
request there is an object whose `args` is a tuple; nothing else of it is used.

Windows are padded on the right, which a causal model does not see. Our own models are trained on full windows padded on
the *left* with the prefix token: `left=True` gives them those, and scores as many tokens at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from polyformer.model import Transformer
from polyformer.models import placed

MAX_NEW = 256  # tokens, where a task does not say


class Request(Protocol):
    """What is used of lm_eval's `Instance`."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class Harness:
    """A causal model and its tokenizer behind the three questions of the harness.

    Args:
        model: with a head, causal.
        tokenizer: of the model; special tokens are not added.
        prefix: id that stands before a text without context (end-of-text or beginning-of-text).
        stop: ids that end a generation; `prefix` ends one as well.
        left: pad on the left with `prefix` up to the whole window, as our own models are trained.
        batch: windows a forward pass.
        device: where the model is moved to, as `placed` has it.

    Raises:
        ValueError: the model is an encoder or has no head.
    """

    def __init__(
        self,
        *,
        model: Transformer,
        tokenizer: Tokenizer,
        prefix: int,
        stop: Sequence[int] = (),
        left: bool = False,
        batch: int = 8,
        device: str = "auto",
    ) -> None:
        if not model.config.causal or model.config.head == "none":
            raise ValueError(
                f"causal is {model.config.causal} and head is {model.config.head!r}; the harness scores next tokens: "
                "give a causal language model"
            )
        self.model, self.tokenizer, self.prefix = placed(model, device).eval(), tokenizer, prefix
        self.stop, self.left, self.batch = frozenset({prefix, *stop}), left, batch
        self.length = model.config.length

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return, for each (context, continuation), the log-probability of the continuation in nats and whether greedy
        decoding would give it. What is longer than the window loses its beginning, the continuation itself with a warning.
        """
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Return, for each (text,), its log-probability behind the prefix token; every token is predicted once, in
        windows as long as the model's.
        """
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            found = list(rolling_windows(self._ids(request.args[0]), self.prefix, self.length))
            pairs += found
            owners += [i] * len(found)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(pairs), strict=True):
            sums[owner] += value
        return sums

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Return, for each (context, settings), the greedy continuation up to the first of settings["until"], or up to
        settings["max_gen_toks"] tokens.

        Raises:
            ValueError: the settings ask for sampling.
        """
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, settings: Mapping[str, Any]) -> str:
        sampling = settings.get("do_sample")  # said outright, it decides, whatever the temperature
        if settings.get("temperature") if sampling is None else sampling:
            raise ValueError(
                f"sampling was asked for ({dict(settings)}); this adapter decodes greedily: do_sample False"
            )
        until = settings.get("until") or []
        marks = [until] if isinstance(until, str) else [mark for mark in until if mark]
        ids = self._ids(context) or [self.prefix]
        new: list[int] = []
        text = ""
        for _ in range(int(settings.get("max_gen_toks", MAX_NEW))):
            logits_1V = self._last_logits([(ids + new)[-self.length :]])
            token = int(logits_1V.argmax())
            if token in self.stop:
                break
            new.append(token)
            text = self.tokenizer.decode(new, skip_special_tokens=False)
            ends = [text.index(mark) for mark in marks if mark in text]
            if ends:
                return text[: min(ends)]
        return text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both as one text and cut where the context ends: a token that spans the cut goes to the continuation's
        side only if the context alone is shorter. Spaces at the end of the context belong to the continuation.
        """
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        if not context:
            ids = self._ids(continuation)
            return ([self.prefix], ids) if not ids or ids[0] != self.prefix else (ids[:1], ids[1:])
        before = self._ids(context)
        return before, self._ids(context + continuation)[len(before) :]

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of the second part of each pair behind the first, longest first so that
        a batch holds windows of like length.
        """
        longest = max((len(asked) for _, asked in pairs), default=0)
        if longest > self.length:
            warnings.warn(
                f"a continuation has {longest} tokens, the window {self.length}: of such ones only the last {self.length} are "
                "scored; load a longer window or use loglikelihood_rolling",
                stacklevel=3,
            )
        scored = [i for i, (_, asked) in enumerate(pairs) if asked]
        order = sorted(scored, key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)  # what nothing asked for gets
        for start in range(0, len(order), self.batch):
            chosen = order[start : start + self.batch]
            inputs = [(pairs[i][0] + pairs[i][1])[:-1][-self.length :] for i in chosen]
            for i, row, logits_TV in zip(chosen, inputs, self._logits(inputs), strict=True):
                asked_C = torch.tensor(pairs[i][1][-self.length :], device=logits_TV.device)
                scores_CV = logits_TV[: len(row)][-len(asked_C) :].float().log_softmax(-1)
                total = scores_CV.gather(1, asked_C[:, None]).sum()
                results[i] = (float(total), bool(torch.equal(scores_CV.argmax(-1), asked_C)))
        return results

    def _logits(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the logits [T, V] of each row, padding removed."""
        longest = self.length if self.left else max(len(row) for row in rows)
        pad = [[self.prefix] * (longest - len(row)) for row in rows]
        tokens = [[*p, *row] if self.left else [*row, *p] for p, row in zip(pad, rows, strict=True)]
        logits_BTV = self.model(torch.tensor(tokens))
        return [x[longest - len(r) :] if self.left else x[: len(r)] for x, r in zip(logits_BTV, rows, strict=True)]

    def _last_logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([x[-1] for x in self._logits(rows)])


def rolling_windows(ids: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (context, predicted) pairs of at most `length` inputs that predict every token once: whole windows in a
    row, and a last one that reaches back for a full context and scores what is left.
    """
    whole = [prefix, *ids]
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        first = max(0, end - length)  # of the inputs; they are whole[first : end]
        yield list(whole[first : start + 1]), list(whole[start + 1 : end + 1])


def harness_model(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    prefix: int,
    stop: Sequence[int] = (),
    left: bool = False,
    device: str = "auto",
) -> Any:
    """Return a `Harness` that is also an lm_eval LM, for `lm_eval.simple_evaluate(model=...)`.

    Raises:
        ImportError: lm_eval is not installed; says how to install it.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ImportError("lm-evaluation-harness is not installed; install it: pip install polyformer[eval]") from error
    base: Any = LM

    class HarnessLM(Harness, base):  # Harness first: its methods are the ones asked for
        def __init__(self) -> None:
            base.__init__(self)
            Harness.__init__(self, model=model, tokenizer=tokenizer, prefix=prefix, stop=stop, left=left, device=device)

    return HarnessLM()
