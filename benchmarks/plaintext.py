"""The models in the clear: cost as the context grows, latency of one request beside the encrypted one, and our mixers beside
independent implementations.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyformer import mixers
from polyformer.commands.console import Failure
from polyformer.commands.isolated import isolated
from polyformer.mixers.linear import Linear
from polyformer.mixers.mamba import Mamba
from polyformer.model import ModelConfig, Transformer

from . import memory, models, records
from .registry import Progress, Record, Settings

LANGUAGE = tuple(n for n in mixers.names() if n != "hyena_nd")  # causal over one axis
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
LIMIT_S, LIMIT_GB = 20.0, 10.0  # of one pass; a longer context than these allow is left out, and the record says why
FITTED = 3  # the longest contexts, from which an exponent is fitted


def config(mixer: str, length: int, *, width: int = 128, blocks: int = 2) -> ModelConfig:
    """A causal model around a mixer: 4 heads, feed-forward of 4 widths, RMS norms, 1,024 tokens of vocabulary."""
    norms = ("rms",) * (2 * blocks + 1)
    return ModelConfig(
        vocab=1024, length=length, width=width, hidden=4 * width, blocks=blocks, mixer=mixer, norms=norms
    )


# --- Cost as the context grows ----------------------------------------------------------------------------------------


def context_growth(settings: Settings) -> Record:
    """Seconds of one pass, and memory, against the number of tokens; fitted exponents."""
    lengths = LENGTHS[:2] if settings.quick else LENGTHS
    names = ("softmax", "linear") if settings.quick else LANGUAGE
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        try:
            rows.append(
                isolated(growth, name, lengths, settings.repeats, progress=settings.within(i, len(names), name))
            )
        except Failure as error:  # its process was killed: the others still count
            rows.append({"name": name, "points": [], "stopped": str(error)})
        settings.keep(_growth_record(rows, settings.repeats))
    return _growth_record(rows, settings.repeats)


def growth(name: str, lengths: Sequence[int], repeats: int, *, progress: Progress) -> dict[str, Any]:
    """One mixer at every length, in a process of its own.

    forward_gb of a point is the process's peak during the passes above what was resident before them (None where the system does not say).
    """
    torch.set_num_threads(1)
    points: list[dict[str, Any]] = []
    stopped = ""
    # Warm up what torch allocates once.
    _pass(Transformer(config(name, 64)).eval(), torch.zeros(1, 64, dtype=torch.int64))
    for i, length in enumerate(lengths):
        progress(i, len(lengths), f"{length} tokens")
        if len(points) > 1:
            stopped = _too_much(points)
            if stopped:
                break
        torch.manual_seed(0)
        model = Transformer(config(name, length)).eval()
        tokens = torch.randint(0, 1024, (1, length))
        with memory.watch() as seen:
            times = _times(partial(_pass, model, tokens), repeats)
        points.append(
            {"tokens": length, "forward_s": statistics.median(times), "forward_gb": seen.grown_gb, **_runs(times)}
        )
    return {"name": name, "points": points, "stopped": stopped, "exponent": exponent(points)}


def _pass(model: Callable[[Tensor], Any], x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def _too_much(points: Sequence[Mapping[str, Any]]) -> str:
    """Why the next, twice as long context is not tried; "" if it is. Judged by the growth of the last doubling, at most fourfold."""
    last, before = points[-1], points[-2]
    for key, limit, unit in (("forward_s", LIMIT_S, "s"), ("forward_gb", LIMIT_GB, "GB")):
        if last[key] is None or before[key] is None:
            continue
        growth_of = min(4.5, max(2.0, last[key] / max(before[key], 1e-9)))
        if last[key] * growth_of > limit:
            return f"{2 * last['tokens']} tokens would take about {last[key] * growth_of:.0f} {unit}, more than {limit:.0f} {unit}"
    return ""


def exponent(points: Sequence[Mapping[str, float]], key: str = "forward_s") -> float | None:
    """e of seconds ~ tokens^e, by least squares over the longest contexts; None if there are fewer than two."""
    tail = points[-FITTED:]
    if len(tail) < 2:
        return None
    return float(np.polyfit([math.log(p["tokens"]) for p in tail], [math.log(p[key]) for p in tail], 1)[0])


def _growth_record(rows: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    params = {
        "width": 128,
        "blocks": 2,
        "heads": 4,
        "vocab": 1024,
        "batch": 1,
        "limit_s": LIMIT_S,
        "limit_gb": LIMIT_GB,
    }
    return records.record("context-growth", metrics={"mixers": rows}, params=params, threads=1, seed=0, repeats=repeats)


# --- One request in the clear, beside the encrypted one --------------------------------------------------------------


def clear_request(settings: Settings) -> Record:
    """Milliseconds of one request of 2 blocks, d = 128, 32 tokens: every mixer in torch, and the polynomial in onnxruntime."""
    import onnxruntime

    torch.set_num_threads(1)
    torch.manual_seed(0)
    blocks, width, tokens = (1, 16, 8) if settings.quick else (2, 128, 32)
    repeats = 3 if settings.quick else 51
    rows: list[dict[str, Any]] = []
    for name in LANGUAGE:
        model = Transformer(config(name, tokens, width=width, blocks=blocks)).eval()
        ids = torch.randint(0, 1024, (1, tokens))
        settings.progress(len(rows), len(LANGUAGE) + 1, name)
        times = _times(partial(_pass, model, ids), repeats)
        rows.append({"name": name, "engine": "torch", **_ms(times), "parameters": model.parameter_count()})
    with tempfile.TemporaryDirectory() as place:
        path, samples = models.encoder(
            Path(place), blocks=blocks, width=width, heads=4, hidden=4 * width, tokens=tokens, classes=1024
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: samples[:1].reshape(session.get_inputs()[0].shape)}
        times = _times(lambda: session.run(None, feed), repeats)
    rows.append({"name": "polynomial", "engine": "onnxruntime", **_ms(times), "parameters": None})
    repeats = min(row["repeats"] for row in rows)  # those that ran, whatever was asked for
    params = {"width": width, "blocks": blocks, "tokens": tokens, "vocab": 1024, "batch": 1}
    return records.record("clear-request", metrics={"rows": rows}, params=params, threads=1, seed=0, repeats=repeats)


# --- Beside independent implementations ------------------------------------------------------------------------------


def references(settings: Settings) -> Record:
    """Our Mamba against the package mambapy, our linear attention against its definition: largest difference, and time, A B A B."""
    torch.set_num_threads(1)
    lengths = (64,) if settings.quick else (256, 1024, 4096)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for name, build in (("mamba", mamba_pair), ("linear", linear_pair)):
            settings.progress(len(rows), 2 * len(lengths), f"{name}, {length} tokens")
            torch.manual_seed(0)
            ours, theirs = build(length)
            rows.append({"name": f"{name}-{length}", "tokens": length, **_race(ours, theirs, length, settings.repeats)})
            settings.keep(_reference_record(rows, settings.repeats))
    return _reference_record(rows, settings.repeats)


def _reference_record(rows: list[dict[str, Any]], repeats: int) -> dict[str, Any]:
    return records.record(
        "references",
        metrics={"rows": rows},
        params={"width": 128, "batch": 1, "mambapy": records.versions(("mambapy",)).get("mambapy")},
        threads=1,
        seed=0,
        repeats=repeats,
    )


Layer = Callable[[Tensor], Tensor]


def mamba_pair(length: int, width: int = 128) -> tuple[Layer, Layer]:
    """Our Mamba and mambapy's block with the same weights.

    Raises:
        ModuleNotFoundError: mambapy is not installed.
    """
    from mambapy.mamba import MambaBlock, MambaConfig

    ours = Mamba(config("mamba", length, width=width))
    theirs = MambaBlock(MambaConfig(d_model=width, n_layers=1))
    weights = {
        "in_proj.weight": ours.inner.weight,
        "conv1d.weight": ours.conv.weight_EW.flip(1)[:, None],
        "conv1d.bias": ours.conv.bias_E,
        "x_proj.weight": ours.select.weight,
        "dt_proj.weight": ours.delta.weight,
        "dt_proj.bias": ours.delta_bias_E,
        "A_log": ours.A_log_EN,
        "D": ours.D_E,
        "out_proj.weight": ours.o.weight,
    }
    theirs.load_state_dict({k: v.detach().clone() for k, v in weights.items()})
    return ours, theirs


def linear_pair(length: int, width: int = 128) -> tuple[Layer, Layer]:
    """Our linear attention (elu + 1, divided), and the definition of arXiv 2006.16236, equation 9, with all sums kept."""
    cfg = config("linear", length, width=width)
    ours = Linear(ModelConfig(**{**cfg.__dict__, "feature_map": "elu"}))

    def theirs(x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (cfg.heads, -1)) for p in (ours.q(x), ours.k(x), ours.v(x)))  # [B, T, H, K]
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
        state = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
        y = torch.einsum("bthk,bthkv->bthv", q, state) / torch.einsum("bthk,bthk->bth", q, k.cumsum(1))[..., None]
        return ours.o(y.flatten(2))

    return ours, theirs


def _race(ours: Layer, theirs: Layer, length: int, repeats: int) -> dict[str, Any]:
    x = torch.randn(1, length, 128)
    with torch.no_grad():
        a, b = ours(x), theirs(x)
    result: dict[str, Any] = {"max_difference": float((a - b).abs().max()), "scale": float(b.abs().max())}
    for kind, run in (("forward", _pass), ("training", _training)):
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for i in range(repeats + 1):
            for who, layer in (("ours", ours), ("theirs", theirs)):
                start = time.perf_counter()
                run(layer, x)
                if i:  # the first warms up
                    times[who].append(time.perf_counter() - start)
        ratios = [t / o for o, t in zip(times["ours"], times["theirs"], strict=True)]
        result[kind] = {
            "ours_s": statistics.median(times["ours"]),
            "theirs_s": statistics.median(times["theirs"]),
            "speedup": statistics.median(ratios),
            "speedup_least": min(ratios),
            "speedup_most": max(ratios),
        }
    return result


def _training(layer: Layer, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    layer(x).square().mean().backward()


# --- Helpers ----------------------------------------------------------------------------------------------------------


def _times(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of so many calls, after one to warm up; fewer where they take long."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if sum(times) > LIMIT_S:
            break
    return times


def _runs(times: Sequence[float]) -> dict[str, Any]:
    """How many calls were timed, and longest minus shortest: None of one, which says nothing about it."""
    return {"repeats": len(times), "spread_s": max(times) - min(times) if len(times) > 1 else None}


def _ms(times: Sequence[float]) -> dict[str, Any]:
    """Median and spread in milliseconds."""
    runs = _runs(times)
    spread = runs["spread_s"]
    return {
        "ms": 1000 * statistics.median(times),
        "spread_ms": None if spread is None else 1000 * spread,
        "repeats": runs["repeats"],
        "warm_ups": 1,
    }
