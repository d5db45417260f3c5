"""The standard demo model under encryption, node by node and primitive by primitive: latency, share, level, error, efficiency.

Laid out as the PowerSoftmax paper's two latency tables (Pythia-70M, 128 tokens, by node and by CKKS primitive), so that they can be
read side by side; the shapes differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from he_backend.circuit import Circuit, Op
from he_backend.execute import Executor
from he_backend.simulator import Case, input_slots, simulate

from .registry import Progress

if TYPE_CHECKING:
    from training import Recipe

TRAINING_SHARE = 8  # of the demo's steps, one in so many is taken: seconds do not depend on what the weights are


def recipe(*, quick: bool) -> Recipe:
    """The demo's recipe with an eighth of its steps (quick: the tiny preset)."""
    from training import Recipe

    return Recipe.quick() if quick else shortened(Recipe.demo())


def shortened(recipe: Recipe) -> Recipe:
    """A recipe with an eighth of the steps of each stage."""
    names = ("softmax_steps", "power_steps", "range_steps", "tune_steps")
    return replace(recipe, **{name: getattr(recipe, name) // TRAINING_SHARE for name in names})


def trained(folder: Path, recipe: Recipe, *, progress: Progress) -> tuple[Path, np.ndarray]:
    """The polynomial model of a recipe as ONNX, and token windows [n, T], the last of which was held out."""
    from polyformer.commands.models import export_checked
    from training import convert, train

    def staged(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        progress(done, total, stage)

    train(folder, recipe, progress=staged)
    convert(folder, progress=staged)
    export_checked(folder, progress=progress)
    with np.load(folder / "calibration.npz", allow_pickle=False) as file:
        return folder / "model.onnx", np.concatenate([file["tokens"], file["heldout"][:1]])


def measure(*, quick: bool, repeats: int, progress: Progress) -> dict[str, Any]:
    """The record `operators`: what `requests.measure` records, with the errors after every node."""
    from compiler import Target

    from . import requests

    steps = "the tiny preset" if quick else f"1/{TRAINING_SHARE} of the demo's training steps"
    with tempfile.TemporaryDirectory() as place:
        path, windows = trained(Path(place), recipe(quick=quick), progress=progress)
        return requests.measure(
            "operators",
            path,
            windows,
            target=Target(insecure_log_n=14) if quick else Target(max_memory_gb=19.0),
            repeats=repeats,
            progress=progress,
            weights=f"trained on the package's text, {steps}, seed 0",
            probe=True,
        )


# --- Errors -----------------------------------------------------------------------------------------------------------


def probed(circuit: Circuit) -> Circuit:
    """The circuit with an output more for the last op of every ONNX node, so that its value can be decrypted."""
    ops = list(circuit.ops)
    for op in circuit.ends:
        attrs = {"name": f"after {op.id}", "part": 0}
        ops.append(
            Op(
                id=len(ops),
                kind="output",
                args=(op.id,),
                attrs=attrs,
                level=op.level - (op.attrs.get("kind") == "pair"),  # half of a pair is at twice the scale
                factor=op.factor,
                source=op.source,
            )
        )
    return replace(circuit, ops=tuple(ops))


def errors(circuit: Circuit, client: Any, server: Any, sequence: Sequence[Case], *, threads: int) -> dict[int, float]:
    """Largest |decrypted - simulated| slot of the last op of every ONNX node, in the model's units, by op id; and of what a step
    keeps, by the id of its output.

    Args:
        sequence: its cases one after the other, each on what the last one left; of a request one.
    """
    more = probed(circuit)
    executor = Executor(more, server, threads=threads, plaintext_budget=0)
    names = {s.name for s in circuit.states}
    looked_at = {op.id: op.args[0] for op in more.ops[len(circuit.ops) :]}
    looked_at |= {op.id: op.id for op in circuit.ops if op.kind == "output" and op.attrs["name"] in names}
    kept = {
        part: server.import_ciphertext(np.zeros((2, at + 1, 1 << circuit.params.log_n), dtype=np.uint64), level=at)
        for part, at in circuit.state_parts.items()
    }
    level, found = circuit.inputs[0].level, dict.fromkeys(looked_at.values(), 0.0)
    for case in sequence:
        exact = simulate(circuit, case.tensors, step=case.step).values
        sent = {
            part: server.import_ciphertext(client.export_ciphertext(client.encrypt(slots, level=level)), level=level)
            for part, slots in input_slots(circuit, case.tensors).items()
            if part not in kept
        }
        run = executor.run({**sent, **kept}, step=case.step)
        for output, of in looked_at.items():
            part = more.ops[output].attrs["name"], more.ops[output].attrs["part"]
            ciphertext = run.outputs[part]
            back = client.import_ciphertext(server.export_ciphertext(ciphertext), level=server.level(ciphertext))
            difference = np.abs(client.decrypt(back, scale=run.scales[part]) - exact[of])
            found[of] = max(found[of], float(np.max(difference) * abs(more.ops[output].factor)))
        kept = {part: run.outputs[part] for part in kept}
    # Two digits: an unrounded difference of a decryption belongs into no file.
    return {op: float(f"{error:.1e}") for op, error in found.items()}
