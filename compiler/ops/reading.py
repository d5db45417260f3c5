"""What a handler works on: one ONNX node as plain data, and the graph that grows while nodes are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from he_backend.base import UnsupportedOpError

from ..ir import Node


@dataclass(frozen=True, kw_only=True)
class Call:
    """One ONNX node; `source` names it in messages, `proto` is the node itself for the reference evaluator.

    Inputs that are left out are "".
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any]
    source: str
    proto: Any = field(default=None, repr=False, compare=False)

    def ints(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        """An attribute that is a list of integers."""
        return tuple(int(n) for n in self.attrs.get(name, default))

    def fail(self, why: str) -> UnsupportedOpError:
        return UnsupportedOpError(f"node {self.source!r} {why}")


@dataclass(kw_only=True)
class Reading:
    """The graph so far: `shapes` of tensors that depend on the input, `constants` of those that do not.

    reference(call, values) computes one ONNX node on arrays; a value of None is an input left out. `same` maps a tensor
    to the one that it equals. `approximate` lets functions that are not polynomials into the graph. `opset` is ONNX's own;
    `readers` counts the nodes that read an ONNX tensor, and the output.
    """

    input: str
    integer: bool
    shapes: dict[str, tuple[int, ...]]
    constants: dict[str, np.ndarray]
    reference: Callable[[Call, list[np.ndarray | None]], list[np.ndarray]] = field(repr=False)
    approximate: bool = False
    opset: int = 20
    readers: Mapping[str, int] = field(default_factory=Counter, repr=False)
    nodes: list[Node] = field(default_factory=list)
    same: dict[str, str] = field(default_factory=dict)

    def encrypted(self, name: str) -> bool:
        return name in self.shapes

    def constant(self, call: Call, i: int, what: str) -> np.ndarray | None:
        """Input i as an array, float64 if it holds numbers that are not integers; None if it is left out.

        Raises:
            UnsupportedOpError: it depends on the encrypted input.
        """
        if i >= len(call.inputs) or not call.inputs[i]:
            return None
        name = call.inputs[i]
        if name not in self.constants:
            raise call.fail(f"is a {call.op} whose {what} ({name!r}) depends on the input; a constant is compiled")
        value = self.constants[name]
        return value.astype(np.float64) if value.dtype.kind == "f" else value

    def ints(self, call: Call, i: int, attribute: str, default: Sequence[int]) -> tuple[int, ...]:
        """A list of integers that is input i in newer opsets and an attribute in older ones."""
        value = self.constant(call, i, attribute)
        return call.ints(attribute, default) if value is None else tuple(int(n) for n in value.reshape(-1))

    def emit(
        self,
        call: Call,
        op: str,
        inputs: tuple[str, ...],
        shape: Sequence[int],
        *,
        name: str | None = None,
        const: np.ndarray | None = None,
        bias: np.ndarray | None = None,
        attrs: dict[str, Any] | None = None,
    ) -> str:
        """Append a node, called like the first output of the ONNX node unless `name` says otherwise; returns its name."""
        name = name or call.outputs[0]
        self.shapes[name] = tuple(int(n) for n in shape)
        self.nodes.append(
            Node(
                name=name,
                op=op,
                inputs=inputs,
                shape=self.shapes[name],
                const=const,
                bias=bias,
                attrs=attrs or {},
                source=call.source,
            )
        )
        return name


Handler = Callable[[Reading, Call], None]
