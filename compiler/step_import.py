"""ONNX to the compiler's graph, for one decoding step with kept keys and values.

The contract is that of `polyformer export --step`: inputs token [1, 1] and step [] as int64, then the kept tensors [1, T, D];
outputs the logits and, in the same order, the kept tensors for the next step. Gather(table [T, ...], step) is public: a tensor
that meets it in Add or Mul becomes `add_step` or `mul_step`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from he_backend.base import UnsupportedOpError

from .ir import STEP, Graph, Kept
from .onnx_import import Importer, inlined, load
from .ops.reading import Call, Reading

INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


def is_step(model: onnx.ModelProto) -> bool:
    """Whether an ONNX model is one step of a sequence: it has a scalar integer input of that name."""
    return any(v.name == STEP and v.type.tensor_type.elem_type in INTEGERS for v in model.graph.input)


class StepImporter(Importer):
    """Reads a step; `publics` are tables [T, ...] by the tensor that holds their row."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = inlined(model)
        self.functions = {(f.domain, f.name) for f in self.model.functions}
        graph = self.model.graph
        constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        shapes = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in graph.input
            if v.name not in constants
        }
        names = list(shapes)
        if len(names) < 3 or names[1] != STEP or len(graph.output) != len(names) - 1:
            raise UnsupportedOpError(
                f"inputs {names} and {len(graph.output)} outputs are no step: token, {STEP}, the kept tensors; logits, the kept tensors"
            )
        kept = [shapes[name] for name in names[2:]]
        if len(set(kept)) != 1 or len(kept[0]) != 3 or not all(kept[0]):
            raise UnsupportedOpError(f"kept tensors have shapes {sorted(set(kept))}; all must be one [1, T, D]")
        self.steps = kept[0][1]
        self.kept = tuple(
            Kept(before=name, after=out.name, shape=shapes[name])
            for name, out in zip(names[2:], graph.output[1:], strict=True)
        )
        self.publics: dict[str, np.ndarray] = {}
        self.reading = Reading(
            input=names[0],
            integer=True,
            shapes={name: shape for name, shape in shapes.items() if name != STEP},
            constants=constants,
            reference=self._reference,
        )

    def run(self) -> Graph:
        graph = super().run()
        made = graph.by_name
        same = self.reading.same
        kept = tuple(Kept(before=k.before, after=same.get(k.after, k.after), shape=k.shape) for k in self.kept)
        for k in kept:
            if k.after not in made or made[k.after].shape != k.shape:
                raise UnsupportedOpError(f"kept tensor {k.before!r} comes back as {k.after!r} of another shape")
        return Graph(**{**vars(graph), "steps": self.steps, "kept": kept})

    def _read(self, call: Call) -> None:
        g = self.reading
        if STEP in call.inputs:
            table = g.constants.get(call.inputs[0])
            if call.op != "Gather" or table is None or call.attrs.get("axis", 0) or len(table) != self.steps:
                raise call.fail(f"reads {STEP!r}; only rows of tables [{self.steps}, ...] are looked up by it")
            self.publics[call.outputs[0]] = table.astype(np.float64)
            return
        public = [name for name in call.inputs if name in self.publics]
        if not public:
            super()._read(call)
            return
        others = [name for name in call.inputs if name not in self.publics]
        if call.op not in ("Add", "Mul") or len(others) != 1 or not g.encrypted(others[0]):
            raise call.fail(
                f"is a {call.op} of {public[0]!r}, a row of a table; it may be added to or multiplied by a tensor"
            )
        table = self.publics[public[0]]
        shape = np.broadcast_shapes(g.shapes[others[0]], table.shape[1:])
        g.emit(call, f"{call.op.lower()}_step", (others[0], STEP), shape, const=table)


def import_any(path: Path, *, approximate: bool = False) -> Graph:
    """Read an ONNX file, be it a whole model (see `onnx_import.import_onnx`) or a step.

    Raises:
        UnsupportedOpError: it is no ONNX file, a node is not a polynomial, or a step's functions should be approximated.
    """
    model = load(path)
    if not is_step(model):
        return Importer(model, approximate=approximate).run()
    if approximate:
        raise UnsupportedOpError(f"{path} is a decoding step: its functions are approximated before it is exported")
    return StepImporter(model).run()
