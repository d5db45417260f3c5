"""Changes of a circuit that make it unsound, for the table of `test_corrupted`."""

from dataclasses import replace

import numpy as np


def first(circuit, kind, *, last=False):
    found = [op for op in circuit.ops if op.kind == kind]
    return found[-1 if last else 0]


def reply(circuit):
    """The op of the reply: a step's states go out as well."""
    return next(op for op in circuit.ops if op.kind == "output" and op.attrs["name"] == circuit.outputs[0].name)


def with_op(circuit, op, **changes):
    ops = list(circuit.ops)
    ops[op.id] = replace(op, **changes)
    return replace(circuit, ops=tuple(ops))


def with_attrs(circuit, op, **changes):
    return with_op(circuit, op, attrs={**op.attrs, **changes})


def with_another(circuit, op, **changes):
    """The circuit with a copy of an op at its end."""
    more = replace(op, id=len(circuit.ops), attrs={**op.attrs, **changes})
    return replace(circuit, ops=(*circuit.ops, more))


def with_array(circuit, name, array):
    return replace(circuit, arrays={**circuit.arrays, name: array})


def with_layout(circuit, door, change):
    name = getattr(circuit, door)[0].layout
    return replace(circuit, client_arrays={**circuit.client_arrays, name: change(circuit.client_arrays[name])})


def with_signature(circuit, door, **changes):
    return replace(circuit, **{door: (replace(getattr(circuit, door)[0], **changes),)})


def weights(circuit):
    return first(circuit, "linear").attrs["weights"]


def out_of_range(layout):
    changed = layout.copy()
    changed[0, 0] = 99
    return changed


def permuted(layout):
    """Two elements trade places: every index is there, in a wrong slot."""
    return np.where(layout == 3, 7, np.where(layout == 7, 3, layout))


def without(circuit, kind):
    """The circuit without its last op, which is of this kind."""
    assert circuit.ops[-1].kind == kind
    return replace(circuit, ops=circuit.ops[:-1])


def with_dearest_key(circuit, change):
    """The highest key, so many levels up or down."""
    k = max(circuit.keys, key=lambda k: circuit.keys[k])
    return replace(circuit, keys={**circuit.keys, k: circuit.keys[k] + change})


def without_key(circuit):
    return replace(circuit, keys={k: level for k, level in circuit.keys.items() if k != min(circuit.keys)})


def higher(circuit):
    """A whole circuit one level up, where its keys no longer reach."""
    ops = tuple(replace(op, level=op.level + 1) for op in circuit.ops)
    doors = {
        name: tuple(replace(s, level=s.level + 1) for s in getattr(circuit, name))
        for name in ("inputs", "outputs", "states")
    }
    return replace(circuit, params=replace(circuit.params, levels=circuit.params.levels + 1), ops=ops, **doors)


def with_needless_keys(circuit):
    """Two rotations that no op makes, as if the list were another circuit's."""
    return replace(circuit, keys={**circuit.keys, 5: 1, 7: 1})
