"""Run the stages of a conversion, report each, and go on after a kill where it happened.

After every stage the state (model, targets of ranges, reports so far) is written to `checkpoints/<recipe>/`, and the
reports to a JSON-lines file. Inside a training stage the loop's own checkpoint counts. A resumed run ends bit for bit
where an uninterrupted one does: each stage is a function of the state before it, of its own data and of its sampler.

A report holds: stage (name), kind, steps done, the quality that the task measures on what was held out (heldout_loss in
nats, of classes also heldout_accuracy), levels (null while a part is not polynomial), ranges (of every tap on held-out
inputs, with the interval it is held against), outside (the share of all those values outside), met (Ranges alone:
whether the wanted share was reached, null if none was wanted), layers (of a matched Swap: relative errors of every
attention as copied, matched and fitted), alone (Substitute alone: the quality after replacing one kind of function and
nothing else).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from polyformer.models import Model, at_once, body, device_of, facts, from_facts, rebuilt
from polyformer.ranges import Collector, measure, range_loss
from training.distil import Fit, Watch, distil_layers
from training.loop import Batches, Schedule, discard_checkpoint, run_stage
from training.recipe import Progress
from training.stages import Continue, Ranges, Rows, Stage, Substitute, Swap, Training, Tune
from training.substitution import (
    KINDS,
    choose_targets,
    fitted_intervals,
    levels,
    ranges_report,
    substitute,
    with_rows,
)
from training.swap import swap_attention, swapped_config


@dataclass(frozen=True, kw_only=True)
class Material:
    """What stages train and measure on.

    Args:
        sampler: of a training stage, new each time it is asked for.
        schedule: of a training stage.
        quality: of a model in evaluation mode, figures by name, `heldout_loss` among them.
        heldout: inputs [n, ...] on which the ranges of every stage are reported.
        calibration: inputs [n, ...] that choose row factors, targets and the end of a range stage.
    """

    sampler: Callable[[Training], Batches]
    schedule: Callable[[Training], Schedule]
    quality: Callable[[Model], dict[str, float]]
    heldout: Tensor
    calibration: Tensor


@dataclass
class State:
    """What one stage hands to the next."""

    model: Model
    targets: dict[str, tuple[float, float]] = field(default_factory=dict)
    weights: Ranges | None = None  # the last Ranges, whose losses stay on while tuning
    reports: list[dict[str, Any]] = field(default_factory=list)


def run(
    start: Model,
    stages: Sequence[Stage],
    material: Material,
    *,
    place: Path,
    log: Path,
    reports: Path,
    progress: Progress | None = None,
) -> tuple[Model, list[dict[str, Any]]]:
    """Run the stages from a checkpoint; return the last model and the reports. The start is left alone, and its
    device is that of all of them.

    Args: `place` is the folder of the states, which `finish` removes; `log` takes the lines of the training loop and
    `reports` one line a stage.

    Raises:
        ValueError: two stages share a name, or `place` holds the state of other stages.
    """
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise ValueError(f"two stages share a name: {', '.join(names)}; logs and checkpoints go by it")
    state = _resume(place, stages, device_of(start)) or State(model=_copy(start))
    for index in range(len(state.reports), len(stages)):
        stage = stages[index]
        found = _apply(state, stage, material, place, log, progress)
        state.reports.append(_report(state, stage, material, found))
        _save(place, state, stages)
        discard_checkpoint(place, stage.name)
        _write_reports(reports, state.reports)
    _write_reports(reports, state.reports)
    return state.model, state.reports


def finish(place: Path) -> None:
    """Remove the states of a conversion whose result has been kept elsewhere."""
    shutil.rmtree(place, ignore_errors=True)


def _apply(
    state: State, stage: Stage, material: Material, place: Path, log: Path, progress: Progress | None
) -> dict[str, Any]:
    """Do one stage to the state; return what only this stage knows for its report."""
    if isinstance(stage, Swap):
        original, state.targets = state.model, {}
        state.model = _swapped(original, stage)
        if stage.matched:
            windows = material.calibration[: stage.matched]
            fits = distil_layers(
                original, state.model, windows, fit=Fit(steps=stage.fit), watch=watched(stage, progress)
            )
            return {"layers": [asdict(fit) for fit in fits]}
    elif isinstance(stage, Rows):
        state.model = with_rows(state.model, material.calibration)
    elif isinstance(stage, Ranges):
        state.weights = stage
        state.targets = choose_targets(
            state.model,
            material.calibration,
            activation_bound=stage.activation_bound,
            variance_ratio=stage.variance_ratio,
            denominator_target=stage.denominator_target,
        )
        steps = _train(state, stage, material, place, log, progress, ranges=True)
        share = _outside(state, material.calibration)
        return {"steps": steps, "met": None if stage.outside is None else share <= stage.outside}
    elif isinstance(stage, Substitute):
        ranged, alone = state.model, {}
        for kind in KINDS:
            if getattr(stage, kind):
                only = replace(stage, **{k: k == kind for k in KINDS})  # type: ignore[arg-type]
                alone[kind] = material.quality(substitute(ranged, only, state.targets, material.calibration))
        state.model = substitute(ranged, stage, state.targets, material.calibration)
        return {"alone": alone}
    elif isinstance(stage, (Continue, Tune)):
        return {"steps": _train(state, stage, material, place, log, progress, ranges=isinstance(stage, Tune))}
    else:
        raise TypeError(f"{type(stage).__name__} is no stage that this machine knows")
    return {}


def watched(stage: Stage, progress: Progress | None) -> Watch | None:
    """Return the call of `distil_layers` that reports one layer after the other as steps of the stage."""
    return None if progress is None else lambda done, total, what: progress(stage.name, done, total, {})


def _swapped(model: Model, stage: Swap) -> Model:
    if stage.fresh is None:
        return swap_attention(model, **stage.change())
    torch.manual_seed(stage.fresh)
    return rebuilt(model, swapped_config(body(model), **stage.change()))


def _train(
    state: State,
    stage: Training,
    material: Material,
    place: Path,
    log: Path,
    progress: Progress | None,
    *,
    ranges: bool,
) -> int:
    """Train the model of the state; return the steps taken."""
    if not stage.steps:
        return 0
    weights = state.weights if ranges else None
    with Collector(state.model) as collector:

        def loss() -> Tensor:
            assert weights is not None
            return range_loss(
                collector,
                state.targets,
                activation=weights.activation_weight,
                variance=weights.variance_weight,
                denominator=weights.denominator_weight,
            )

        def met(done: int) -> bool:
            assert isinstance(stage, Ranges) and stage.outside is not None
            return done % stage.every == 0 and _outside(state, material.calibration) <= stage.outside

        return run_stage(
            state.model,
            material.sampler(stage),
            stage=stage.name,
            schedule=material.schedule(stage),
            folder=place,
            log=log,
            extra=loss if weights is not None else None,
            until=met if isinstance(stage, Ranges) and stage.outside is not None else None,
            progress=progress,
        )


def _outside(state: State, inputs: Tensor) -> float:
    """Return the share of all values outside the targets, in evaluation mode; the mode stays as it was."""
    training = state.model.training
    model = state.model.eval()
    found = measure(model, inputs, intervals=state.targets, batch=at_once(model)).values()
    state.model.train(training)
    return sum((r.below + r.above) * r.count for r in found) / max(1, sum(r.count for r in found))


def _report(state: State, stage: Stage, material: Material, found: dict[str, Any]) -> dict[str, Any]:
    state.model.eval()
    intervals = state.targets | fitted_intervals(state.model)
    return {
        "stage": stage.name,
        "kind": stage.facts()["kind"],
        **found,
        **material.quality(state.model),
        "levels": levels(state.model),
        **ranges_report(state.model, material.heldout, intervals),
    }


def _copy(model: Model) -> Model:
    copy = rebuilt(model, body(model))
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def _save(place: Path, state: State, stages: Sequence[Stage]) -> None:
    """Write the state after its last stage: the tensors first, then, atomically, the JSON file that makes them count."""
    done = len(state.reports)
    place.mkdir(parents=True, exist_ok=True)
    save_model(state.model, str(place / f"state-{done}.safetensors"))
    values = {
        "stages": [stage.facts() for stage in stages[:done]],
        "model": facts(state.model),
        "targets": state.targets,
        "reports": state.reports,
    }
    temporary = place / "state.tmp"
    temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")
    temporary.replace(place / "state.json")
    (place / f"state-{done - 1}.safetensors").unlink(missing_ok=True)


def _resume(place: Path, stages: Sequence[Stage], device: torch.device) -> State | None:
    path = place / "state.json"
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    done = len(values["reports"])
    wanted = json.loads(json.dumps([stage.facts() for stage in stages[:done]]))
    if values["stages"] != wanted:
        i = next((i for i, (a, b) in enumerate(zip(values["stages"], wanted, strict=False)) if a != b), len(wanted))
        raise ValueError(
            f"{place} holds a conversion whose stage {i + 1} is another; remove that folder to start again"
        )
    model = from_facts(values["model"])
    load_model(model, str(place / f"state-{done}.safetensors"))
    ranges = [stage for stage in stages[:done] if isinstance(stage, Ranges)]
    return State(
        model=model.to(device).eval(),
        targets={name: (lo, hi) for name, (lo, hi) in values["targets"].items()},
        weights=ranges[-1] if ranges else None,
        reports=values["reports"],
    )


def _write_reports(path: Path, reports: list[dict[str, Any]]) -> None:
    """Replace the lines of these stages in the file; lines of other recipes stay."""
    mine = {report["stage"] for report in reports}
    kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in kept if json.loads(line)["stage"] not in mine] + [json.dumps(r) for r in reports]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)
