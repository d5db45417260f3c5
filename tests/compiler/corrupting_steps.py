"""Changes of a decoding step that make it unsound, and what is said of them: tables for `test_corrupted`."""

from dataclasses import replace

import numpy as np

from .corrupting import permuted, with_array, with_attrs, with_op


def with_state(circuit, **changes):
    """The first state declared otherwise."""
    return replace(circuit, states=(replace(circuit.states[0], **changes), *circuit.states[1:]))


def state_op(circuit, kind):
    return next(op for op in circuit.ops if op.kind == kind and op.attrs["name"] == circuit.states[0].name)


def table(circuit):
    """The array of a step's rows."""
    return next(op for op in circuit.ops if op.kind in ("mul_step", "add_step")).attrs["array"]


def written(circuit):
    """The array of the places into which the first state's rows go."""
    before = state_op(circuit, "input").id
    (total,) = (op for op in circuit.ops if op.kind == "add" and before in op.args)
    (row,) = (circuit.ops[a] for a in total.args if a != before)
    return row.attrs["array"]


def with_product_as_state(circuit):
    """The last state leaves as the first product that has as many levels: nearly at its scale, and not at it."""
    name, level = circuit.states[-1].name, circuit.states[-1].level
    product = next(op for op in circuit.ops if op.kind == "mul" and op.level >= level)
    out = next(op for op in circuit.ops if op.kind == "output" and op.attrs["name"] == name)
    return with_op(circuit, out, args=(product.id,))


def with_state_twice_as_large(circuit):
    """Its signature and both its ends agree."""
    changed = with_state(circuit, factor=2 * circuit.states[0].factor)
    for kind in ("input", "output"):
        changed = with_op(changed, state_op(circuit, kind), factor=2 * circuit.states[0].factor)
    return changed


OF_STEPS = {
    "a state at another level": (
        lambda c: with_state(c, level=c.states[0].level - 1),
        r"= input\(\).*: its signature says level \d+",
    ),
    "a state that goes out lower than it came in": (
        lambda c: with_op(c, state_op(c, "output"), level=c.states[0].level - 1),
        r"= output\(.*: its signature says level \d+",
    ),
    "a state at another scale": (
        lambda c: with_op(c, state_op(c, "output"), factor=2 * c.states[0].factor),
        r"= output\(.*: factor \S+; its signature says \S+",
    ),
    "a state that is not read": (
        lambda c: with_attrs(c, state_op(c, "input"), name="z"),
        r"input '.*': ciphertexts \[\] are there; its layout has 1",
    ),
    "a state that is not written": (
        lambda c: with_attrs(c, state_op(c, "output"), name="z"),
        r"output '.*': ciphertexts \[\] are there; its layout has 1",
    ),
    "a state that nobody declared": (
        lambda c: replace(c, states=c.states[1:]),
        r"= input\(\).*: there is no input '.*'; known are",
    ),
    "a state of another shape": (
        lambda c: with_state(c, shape=(c.states[0].shape[0] + 1, *c.states[0].shape[1:])),
        r"input '.*': \d+ of \d+ elements lie in no slot of layout",
    ),
    "layout of a state removed": (
        lambda c: replace(c, arrays={k: a for k, a in c.arrays.items() if k != c.states[0].layout}),
        r"input '.*': there is no layout array '.*'",
    ),
    "rows for a step less": (
        lambda c: with_array(c, table(c), c.arrays[table(c)][:-1]),
        r"has (\d+) rows for \d+ steps",
    ),
    "a step more than rows": (lambda c: replace(c, steps=c.steps + 1), r"has \d+ rows for \d+ steps"),
    "no steps": (lambda c: replace(c, steps=0), r"has \d+ rows for 0 steps"),
}
# The deep one keeps its states above all products.
OF_LEVELED_STEPS = {
    "a state at a scale that drifts": (
        with_product_as_state,
        r"state '.*' goes out at a scale that differs by \S+ from the one at which it comes in",
    ),
}

# What the model alone can tell.
OF_KEPT = {
    "a row that goes to another place": (
        lambda c: with_array(c, written(c), np.roll(c.arrays[written(c)], 1, axis=0)),
        r"output '.*' of step 0 differs from the graph by",
    ),
    "a row that is written a little larger": (
        lambda c: with_array(c, written(c), c.arrays[written(c)] * 1.001),
        r"output '.*' of step 0 differs from the graph by",
    ),
    "the last row wrong": (
        lambda c: with_array(c, table(c), np.concatenate([c.arrays[table(c)][:-1], c.arrays[table(c)][:1]])),
        r"of step 7 (differs from the graph|\(.*above)",
    ),
    "a state that stays as it was": (
        lambda c: with_op(c, state_op(c, "output"), args=(state_op(c, "input").id,)),
        r"output '.*state' of step 0 differs from the graph by 1.00e\+00",
    ),
    "a state twice as large": (with_state_twice_as_large, r"'.*state' (reaches|of step 0 differs)"),
    "layout of a state permuted": (
        lambda c: with_array(c, c.states[0].layout, permuted(c.arrays[c.states[0].layout])),
        r"output '.*state' of step 0 differs from the graph by",
    ),
    "bound of a state lowered": (
        lambda c: with_state(c, bound=0.1 * c.states[0].bound),
        r"'.*state' reaches \S+ of step \d, above the \S+ of its signature",
    ),
}
