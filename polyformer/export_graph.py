"""The ONNX graph while it grows: nodes, constants and the local functions of polynomials."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import Tensor

from polyformer.layers import PolynomialLayer

OPSET = 17
DOMAIN = "polyformer"


class Graph:
    """Collects nodes, constants and local functions while the walkers below go through the model."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.functions: dict[str, onnx.FunctionProto] = {}

    def node(
        self,
        op: str,
        inputs: list[str],
        name: str,
        *,
        output: str | None = None,
        domain: str = "",
        **attributes: int | float | list[int],
    ) -> str:
        """Append a node called `name`, whose value has the same name unless `output` says otherwise; return the
        value's name.
        """
        output = output or name
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, domain=domain, **attributes))  # type: ignore[arg-type]
        return output

    def renamed(self, output: str) -> str:
        """Call the value of the last node by another name, that of an output of the graph; return it."""
        self.nodes[-1].output[0] = output
        return output

    def constant(self, name: str, value: Tensor | np.ndarray | float) -> str:
        """Add an initializer (float32 unless the array is integer) and return its name."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def polynomial(self, layer: PolynomialLayer, name: str, x: str) -> str:
        """Call the local function of the layer's basis and degree."""
        function = f"Polynomial_{layer.basis}_{layer.degree}"
        if function not in self.functions:
            self.functions[function] = polynomial_function(layer.basis, layer.degree)
        a, b = layer.map.tolist()
        scalars = {"a": a, "b": b, **{f"c{k}": c for k, c in enumerate(layer.coefficients.tolist())}}
        inputs = [x, *(self.constant(f"{name}.{k}", value) for k, value in scalars.items())]
        return self.node(function, inputs, name, domain=DOMAIN)


def polynomial_function(basis: str, degree: int) -> onnx.FunctionProto:
    """Return the local function of a basis and degree: Horner for powers, Clenshaw for Chebyshev, in Mul, Add and Sub
    only.
    """
    nodes: list[onnx.NodeProto] = []

    def op(kind: str, left: str, right: str, out: str) -> str:
        nodes.append(helper.make_node(kind, [left, right], [out]))
        return out

    c = [f"c{k}" for k in range(degree + 1)]
    u = op("Add", op("Mul", "x", "a", "ax"), "b", "u")
    if degree == 0:
        op("Add", op("Sub", u, u, "zero"), c[0], "y")
    elif basis == "power" or degree == 1:
        y = c[-1]
        for k in range(degree - 1, -1, -1):
            y = op("Add", op("Mul", u, y, f"p{k}"), c[k], f"h{k}" if k else "y")
    else:
        two_u = op("Add", u, u, "two_u")
        b1, b2 = c[-1], ""
        for k in range(degree - 1, 0, -1):
            b0 = op("Add", op("Mul", two_u, b1, f"p{k}"), c[k], f"s{k}")
            b0 = op("Sub", b0, b2, f"b{k}") if b2 else b0
            b1, b2 = b0, b1
        op("Sub", op("Add", op("Mul", u, b1, "p0"), c[0], "s0"), b2, "y")
    return helper.make_function(
        DOMAIN, f"Polynomial_{basis}_{degree}", ["x", "a", "b", *c], ["y"], nodes, [helper.make_opsetid("", OPSET)]
    )
