"""ONNX to the compiler's graph, by table; whatever is not a polynomial is refused by name.

Nodes whose inputs are all constants are computed while reading, shape arithmetic among them: shapes are fixed. Local functions
named Polynomial_power_n and Polynomial_chebyshev_n are kept whole: inputs (x, a, b, c_0 .. c_n), value sum c_k u^k or
sum c_k T_k(u) with u = a x + b. Other local functions are inlined. The handlers are in `ops/`, a table for each kind of op.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper
from onnx.reference import ReferenceEvaluator

from he_backend.base import UnsupportedOpError

from .ir import Graph
from .ops import arithmetic, functions, moves, norms, products, sums, windows
from .ops.reading import Call, Handler, Reading
from .ops.refuse import INSTEAD, not_fitted, refusal

TABLE: dict[str, Handler] = {
    **arithmetic.TABLE,
    **functions.TABLE,
    **moves.TABLE,
    **norms.TABLE,
    **products.TABLE,
    **sums.TABLE,
    **windows.TABLE,
}
POLYNOMIAL = tuple(sorted({*TABLE, "Constant", "Shape", "Size"} - set(functions.TABLE) - set(norms.TABLE)))
DOMAINS = ("", "ai.onnx")
RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


class Importer:
    """Reads one ONNX graph node by node into a `Reading`."""

    def __init__(self, model: onnx.ModelProto, *, approximate: bool = False) -> None:
        self.model = inlined(model)
        self.functions = {(f.domain, f.name) for f in self.model.functions}
        constants = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer}
        inputs = [v for v in self.model.graph.input if v.name not in constants]
        if len(inputs) != 1 or len(self.model.graph.output) != 1:
            raise UnsupportedOpError(
                f"the graph has inputs {[v.name for v in inputs]} and {len(self.model.graph.output)} outputs; one of each is compiled"
            )
        tensor, output = inputs[0].type.tensor_type, self.model.graph.output[0].name
        if any(not d.dim_value for d in tensor.shape.dim):
            raise UnsupportedOpError(f"input {inputs[0].name!r} has a dynamic shape; export it with fixed sizes")
        self.reading = Reading(
            input=inputs[0].name,
            integer=tensor.elem_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32),
            shapes={inputs[0].name: tuple(d.dim_value for d in tensor.shape.dim)},
            constants=constants,
            reference=self._reference,
            approximate=approximate,
            opset=next(o.version for o in self.model.opset_import if o.domain in DOMAINS),
            readers=Counter(name for names in (*(n.input for n in self.model.graph.node), [output]) for name in names),
        )

    def run(self) -> Graph:
        g = self.reading
        for call in self._calls():
            self._read(call)
        output = self.model.graph.output[0].name
        if g.same.get(output, output) not in g.shapes:
            raise UnsupportedOpError(f"output {output!r} does not depend on the input {g.input!r}: nothing to compile")
        return Graph(
            input=g.input,
            input_shape=g.shapes[g.input],
            output=g.same.get(output, output),
            nodes=tuple(g.nodes),
            metadata={p.key: p.value for p in self.model.metadata_props},
        )

    def _calls(self) -> Iterator[Call]:
        """The nodes as plain data, in order."""
        for i, proto in enumerate(self.model.graph.node):
            yield Call(
                op=proto.op_type,
                inputs=tuple(self.reading.same.get(name, name) for name in proto.input),
                outputs=tuple(proto.output),
                attrs={a.name: _plain(a) for a in proto.attribute},
                source=proto.name or f"{proto.op_type}_{i}",
                proto=proto,
            )

    def _read(self, call: Call) -> None:
        """One node into the graph, or into the constants."""
        if not any(self.reading.encrypted(name) for name in call.inputs):
            self._fold(call)
        elif call.op in ("Shape", "Size") and call.proto.domain in DOMAINS:
            self._shape(call)
        else:
            self._handler(call)(self.reading, call)

    def _handler(self, call: Call) -> Handler:
        domain = call.proto.domain
        if (domain, call.op) in self.functions and call.op.startswith("Polynomial_"):
            return arithmetic.polynomial
        if call.op in TABLE and domain in DOMAINS:
            return TABLE[call.op]
        if self.reading.approximate and call.op in INSTEAD:
            raise not_fitted(call)
        raise refusal(call, POLYNOMIAL)

    def _fold(self, call: Call) -> None:
        """Compute a node of constants."""
        g = self.reading
        graphs = any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in call.proto.attribute)
        if call.op in RANDOM or graphs:
            raise refusal(call, POLYNOMIAL)
        values = self._reference(call, [g.constants[name] if name else None for name in call.inputs])
        g.constants.update({name: v for name, v in zip(call.outputs, values, strict=False) if name})

    def _shape(self, call: Call) -> None:
        shape = self.reading.shapes[call.inputs[0]]
        start, end = call.attrs.get("start", 0), call.attrs.get("end")
        value = np.array(int(np.prod(shape)) if call.op == "Size" else shape[start:end], dtype=np.int64)
        self.reading.constants[call.outputs[0]] = value

    def _reference(self, call: Call, values: list[np.ndarray | None]) -> list[np.ndarray]:
        """One node by itself in ONNX's reference evaluator."""
        proto = onnx.NodeProto()
        proto.CopyFrom(call.proto)
        names = [f"in{i}" if value is not None else "" for i, value in enumerate(values)]
        del proto.input[:], proto.output[:]
        proto.input.extend(names)
        outputs = [f"out{i}" if name else "" for i, name in enumerate(call.outputs)]
        proto.output.extend(outputs)
        graph = helper.make_graph(
            [proto],
            "node",
            [helper.make_value_info(n, onnx.TypeProto()) for n in names if n],
            [helper.make_value_info(n, onnx.TypeProto()) for n in outputs if n],
        )
        model = helper.make_model(graph, opset_imports=self.model.opset_import, functions=self.model.functions)
        try:
            found = ReferenceEvaluator(model).run(None, {n: v for n, v in zip(names, values, strict=True) if n})
        except Exception as error:  # the evaluator raises whatever NumPy does
            raise call.fail(f"is a {call.op} of constants that ONNX's reference evaluator rejects: {error}") from error
        rest = iter(found)
        return [np.asarray(next(rest)) if name else np.zeros(0) for name in outputs]


def _plain(attribute: onnx.AttributeProto) -> Any:
    """An attribute as Python data: text for bytes."""
    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every local function but the polynomials written out."""
    others = [(f.domain, f.name) for f in model.functions if not f.name.startswith("Polynomial_")]
    return inliner.inline_selected_functions(model, others) if others else model


def import_onnx(path: Path, *, approximate: bool = False) -> Graph:
    """Read an ONNX file.

    Args:
        approximate: let elementwise functions that are no polynomials in, as nodes `function`, and softmax and norms written out;
            the pass `passes.approximate` must replace them before the graph can be lowered.

    Raises:
        UnsupportedOpError: it is not an ONNX file, or a node is not a polynomial; the message names it and what to use instead.
    """
    return Importer(load(path), approximate=approximate).run()


def load(path: Path) -> onnx.ModelProto:
    """An ONNX file that the checker accepts; UnsupportedOpError otherwise."""
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except FileNotFoundError:
        raise
    except Exception as error:  # protobuf and the checker raise types of their own
        raise UnsupportedOpError(f"{path} is not an ONNX file that the checker accepts: {error}") from error
    return model
