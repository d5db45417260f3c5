"""train or adopt, convert, export: from text, or from a released checkpoint, to an ONNX file of nothing but polynomials."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from polyformer.commands.console import Advance, Failure, bar, emit, must_exist, say
from polyformer.commands.options import AUTO, Device, Json

Out = Annotated[Path, typer.Argument(help="Folder of the model.")]
Text = Annotated[
    Path | None, typer.Option(help="Text file or folder of .txt files; default: speeches in this package.")
]
Classes = Annotated[
    Path | None, typer.Option(help="Folder with a folder of .txt files for each class, which an encoder is to tell.")
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="A number of the recipe, name=value; as often as wanted.")
]
ONNX_TOLERANCE = 1e-4
STEP_WINDOWS = 4  # of all their places


class Conversion(str, Enum):
    """The recipes of `convert`; `training.stages` holds their stages."""

    powersoftmax = "powersoftmax"
    pointwise = "pointwise"


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Model", epilog="Example: polyformer train runs/mine --text essays.txt")(train)
    app.command(rich_help_panel="Model", epilog="Example: polyformer adopt checkpoints/gpt2 --out runs/gpt2")(adopt)
    app.command(rich_help_panel="Model", epilog="Example: polyformer convert runs/mine")(convert)
    app.command(rich_help_panel="Model", epilog="Example: polyformer export runs/mine")(export)


def train(
    out: Out,
    text: Text = None,
    classes: Classes = None,
    images: Annotated[
        Path | None,
        typer.Option(help=".npz with `images` [n, (C,) H, W] and `labels` [n]: train a vision transformer."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="A tiny model in seconds, for tests.")] = False,
    changes: Changes = None,
    device: Device = AUTO,
    json: Json = False,
) -> None:
    """Train a PowerSoftmax model and its softmax twin on text, or a classifier; in an adopted folder, the released model."""
    given = {"next tokens": text, "texts": classes, "images": images}
    asked = [task for task, path in given.items() if path is not None]
    if len(asked) > 1:
        raise Failure("give one of --text, --classes and --images")
    task = asked[0] if asked else "next tokens"
    with resumable(), bar("train") as advance:
        metrics = train_model(
            out, given[task], quick, task=task, changes=changes or (), device=device, progress=advance
        )
        finish(metrics, out, json)


def adopt(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Hugging Face folder with config.json, tokenizer.json and safetensors, or a .gguf file."),
    ],
    to: Annotated[Path, typer.Option("--out", help="New folder of the model.")],
    text: Text = None,
    classes: Classes = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Window in tokens; default: the checkpoint's, at most 128.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each stage of training.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 8,
    changes: Changes = None,
    end: Annotated[
        str | None, typer.Option(help="Token, or its id, that ends a document; default: the checkpoint's.")
    ] = None,
    device: Device = AUTO,
    json: Json = False,
) -> None:
    """Take a released checkpoint into a folder, with its tokenizer, for train, convert, export and all after them."""
    from training import adopt as run

    numbers = {"length": length, "steps": steps, "batch": batch, "changes": changes or (), "device": device}
    finish(run(checkpoint, to, text=text, classes=classes, end=end, **numbers), to, json)  # type: ignore[arg-type]


def convert(
    out: Out,
    recipe: Annotated[
        Conversion, typer.Option(help="powersoftmax: one bounded division; pointwise: none, trained from scratch.")
    ] = Conversion.powersoftmax,
    device: Device = AUTO,
    json: Json = False,
) -> None:
    """Turn the trained model into polynomials, in stages; each stage is reported in stages.jsonl."""
    with resumable(), bar("convert") as advance:
        finish(convert_model(out, recipe.value, device=device, progress=advance), out, json)


def train_model(
    out: Path,
    text: Path | None,
    quick: bool,
    *,
    task: str = "next tokens",
    changes: Sequence[str] = (),
    device: str = AUTO,
    progress: Advance,
) -> dict[str, Any]:
    """Train into a folder; its metrics."""
    from training import Recipe, train_on
    from training import train as run

    if (out / "released.safetensors").exists():
        if text is not None or quick or changes:
            raise Failure(f"{out} was adopted, with its own text and recipe: train it without further options")
        return train_on(out, device=device, progress=staged(progress))
    presets = {"texts": Recipe.texts, "images": Recipe.images}
    recipe = presets[task](quick=quick) if task in presets else Recipe.quick() if quick else Recipe.demo()
    return run(out, recipe.changed(changes), text=text, device=device, progress=staged(progress))


def convert_model(out: Path, recipe: str = "powersoftmax", *, device: str = AUTO, progress: Advance) -> dict[str, Any]:
    """Convert a trained folder by a recipe of stages; its metrics."""
    from training import convert as run

    must_exist(out / "config.json", f"polyformer train {out}")
    return run(out, recipe=recipe, device=device, progress=staged(progress))


@contextmanager
def resumable() -> Iterator[None]:
    """Say on Ctrl-C that nothing is lost: what a step or a stage has done is in the folder."""
    try:
        yield
    except KeyboardInterrupt as stop:
        say(f"{str(stop) or 'stopped'}; the same command goes on from there")
        raise


def staged(advance: Advance) -> Callable[[str, int, int, dict[str, float]], None]:
    """Training's progress call on top of ours: each stage fills the bar once."""

    def progress(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        numbers = " ".join(f"{k} {v:.4g}" for k, v in figures.items() if isinstance(v, (int, float)))
        advance(done, total, f"{stage} {numbers}")

    return progress


def export(
    out: Out,
    model: Annotated[
        str, typer.Option(help="Which model: polynomial, pointwise, power, softmax or released.")
    ] = "polynomial",
    step: Annotated[
        bool,
        typer.Option("--step", help="Write step.onnx, one token at a time with kept keys and values, for generate."),
    ] = False,
    json: Json = False,
) -> None:
    """Write model.onnx, check it in onnxruntime, and write calibration.npz for the compiler."""
    with bar("export") as advance:
        result = (export_step_checked if step else export_checked)(out, model, progress=advance)
    if json:
        emit(result)
    say(
        f"{result['path']}: onnxruntime and torch differ by at most {result['max_difference']:.2g} on {result['windows']} windows"
    )


def export_checked(out: Path, model: str = "polynomial", *, progress: Advance) -> dict[str, Any]:
    """Export, and hold onnxruntime against torch on held-out text.

    Raises:
        Failure: the logits differ by more than 1e-4.
    """
    import numpy as np
    import onnxruntime
    import torch

    from polyformer.export import export_onnx
    from training import load_model, load_task

    must_exist(out / "config.json", f"polyformer train {out}")
    network, task = load_model(out, model), load_task(out)
    path = out / "model.onnx"
    export_onnx(network, path, metadata=task.reading.metadata())
    heldout = task.heldout.numpy()
    kind = "tokens" if heldout.ndim == 2 else "inputs"  # what the compiler calls token ids, and numbers
    arrays = {kind: task.calibration().numpy(), "heldout": heldout[:256]}
    np.savez_compressed(out / "calibration.npz", allow_pickle=False, **arrays)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    windows = heldout[:16]
    with torch.no_grad():
        ours = network(torch.from_numpy(windows)).double().numpy()
    require_finite(ours, out, model)
    theirs = []
    for i, window in enumerate(windows):
        theirs.append(session.run(None, {name: window[None]})[0])
        progress(i + 1, len(windows), "onnxruntime against torch")
    difference = float(np.abs(ours - np.concatenate(theirs)).max())
    if not difference <= ONNX_TOLERANCE:
        raise Failure(
            f"onnxruntime and torch differ by {difference:.3g}, more than {ONNX_TOLERANCE}: {path} is not the model"
        )
    return {"path": str(path), "max_difference": difference, "windows": len(windows), "bytes": path.stat().st_size}


def export_step_checked(out: Path, model: str = "polynomial", *, progress: Advance) -> dict[str, Any]:
    """Export one decoding step, and hold it in onnxruntime against the whole model in torch at every place of some windows.

    Raises:
        Failure: the logits differ by more than 1e-4.
    """
    import numpy as np
    import onnxruntime
    import torch

    from polyformer.export_step import export_step
    from polyformer.model import Transformer
    from training import load_model, load_task

    must_exist(out / "config.json", f"polyformer train {out}")
    network, task, path = load_model(out, model), load_task(out), out / "step.onnx"
    if not isinstance(network, Transformer):
        raise Failure(f"{out} holds a classifier, which has no next token: export it without --step")
    export_step(network, path, metadata=task.reading.metadata())
    heldout = task.heldout.numpy()
    np.savez_compressed(out / "calibration.npz", tokens=task.calibration().numpy(), heldout=heldout[:256])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    kept, windows, difference = session.get_inputs()[2:], heldout[:STEP_WINDOWS], 0.0
    with torch.no_grad():
        ours = network(torch.from_numpy(windows)).double().numpy()
    require_finite(ours, out, model)
    for i, window in enumerate(windows):
        states = [np.zeros(k.shape, dtype=np.float32) for k in kept]
        for t, token in enumerate(window):
            feed = {"token": token.reshape(1, 1), "step": np.array(t, dtype=np.int64)}
            feed |= {k.name: state for k, state in zip(kept, states, strict=True)}
            logits, *states = session.run(None, feed)
            difference = max(difference, float(np.abs(logits[0, 0] - ours[i, t]).max()))
        progress(i + 1, len(windows), "onnxruntime against torch")
    if not difference <= ONNX_TOLERANCE:
        raise Failure(
            f"onnxruntime and torch differ by {difference:.3g}, more than {ONNX_TOLERANCE}: {path} is not the model"
        )
    return {"path": str(path), "max_difference": difference, "windows": len(windows), "bytes": path.stat().st_size}


def require_finite(logits: Any, out: Path, model: str) -> None:
    """Refuse a model whose values left the intervals of its polynomials.

    Raises:
        Failure: a logit is NaN or infinite.
    """
    import numpy as np

    if not np.isfinite(logits).all():
        raise Failure(
            f"the {model} model of {out} gives logits that are not finite on held-out data: values leave the intervals of its "
            f"polynomials, {out / 'stages.jsonl'} says where; convert with more steps or wider targets"
        )


def finish(metrics: dict[str, Any], out: Path, json: bool) -> None:
    if json:
        emit(metrics)
    say(f"{out}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float))))
