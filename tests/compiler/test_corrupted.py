"""A corrupted circuit is refused in a sentence: by the loader where the file alone can tell, by the verifier where the model must."""

import json
from dataclasses import replace

import numpy as np
import pytest

from compiler import Target, compile_onnx, verify
from he_backend.base import WireError
from he_backend.circuit import Circuit
from he_backend.circuit_check import faults, key_faults

from .models import norm_mlp

SLOTS = 512


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A compiled model with the samples that it was calibrated on."""
    samples = np.random.default_rng(1).normal(0, 0.5, (4, 4, 8)).astype(np.float32)
    path = norm_mlp(tmp_path_factory.mktemp("m") / "m.onnx", layer_norm=True, width=8)
    return compile_onnx(path, samples, target=Target(insecure_log_n=10)), samples


def first(circuit, kind, *, last=False):
    found = [op for op in circuit.ops if op.kind == kind]
    return found[-1 if last else 0]


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
    inputs, outputs = (tuple(replace(s, level=s.level + 1) for s in door) for door in (circuit.inputs, circuit.outputs))
    params = replace(circuit.params, levels=circuit.params.levels + 1)
    return replace(circuit, params=params, ops=ops, inputs=inputs, outputs=outputs)


def with_needless_keys(circuit):
    """Two rotations that no op makes, as if the list were another circuit's."""
    return replace(circuit, keys={**circuit.keys, 5: 1, 7: 1})


KEY_MISSING = r"rotation by \d+ is used at level \d+; its key in the circuit's list is missing"

# What the loader says of a file whose hash is right: somebody wrote it so.
BY_THE_LOADER = {
    "level above its operand's": (
        lambda c: with_op(c, first(c, "mul"), level=first(c, "input").level),
        r"= mul\(.* needs its operand at level \d+; %\d+ has \d+",
    ),
    "level above the chain's": (
        lambda c: with_op(
            with_signature(c, "inputs", level=c.params.levels + 1), first(c, "input"), level=c.params.levels + 1
        ),
        r"level \d+ of a chain of \d+",
    ),
    "negative level": (
        lambda c: with_op(with_signature(c, "outputs", level=-1), c.ops[-1], level=-1),
        r"level -1 of a chain of \d+",
    ),
    "level of an input's signature": (
        lambda c: with_signature(c, "inputs", level=c.inputs[0].level - 1),
        r"= input\(\).*: its signature says level \d+",
    ),
    "scale of an output": (
        lambda c: with_signature(c, "outputs", factor=2 * c.outputs[0].factor),
        r"= output\(.*: factor \S+; its signature says \S+",
    ),
    "factor of nothing": (lambda c: with_op(c, first(c, "mul"), factor=0.0), r"factor 0.0 .* need a finite factor"),
    "negative bound": (lambda c: with_op(c, first(c, "mul"), bound=-1.0), r"bound -1.0; need .* at least 0"),
    "argument of the future": (
        lambda c: with_op(c, first(c, "linear"), args=(len(c.ops) - 1,)),
        r"op \d+ has id \d+ and arguments \(\d+,\): a circuit is numbered in order of use",
    ),
    "itself as argument": (
        lambda c: with_op(c, first(c, "linear"), args=(first(c, "linear").id,)),
        "a circuit is numbered in order of use",
    ),
    "an argument too many": (
        lambda c: with_op(c, first(c, "linear"), args=(0, 0)),
        "a linear takes 1 operands, not 2",
    ),
    "an attribute too few": (
        lambda c: with_op(c, first(c, "linear"), attrs={"plan": []}),
        "a linear needs the attribute 'weights'",
    ),
    "output removed": (lambda c: without(c, "output"), r"output 'y': ciphertexts \[\] are there; its layout has 1"),
    "input renamed": (
        lambda c: with_attrs(c, first(c, "input"), name="z"),
        r"input 'x': ciphertexts \[\] are there; its layout has 1",
    ),
    "an output twice": (
        lambda c: with_another(c, first(c, "output", last=True)),
        r"output 'y': ciphertexts \[0, 0\] are there; its layout has 1",
    ),
    "an input too many": (
        lambda c: with_another(c, first(c, "input"), part=1),
        r"input 'x': ciphertexts \[0, 1\] are there; its layout has 1",
    ),
    "an input of another name": (
        lambda c: with_another(c, first(c, "input"), name="z"),
        r"= input\(\).*: there is no input 'z'; known are x",
    ),
    "an output of another name": (
        lambda c: with_another(c, first(c, "output"), name="z"),
        r"= output\(.*: there is no output 'z'; known are y",
    ),
    "array removed": (
        lambda c: replace(c, arrays={k: a for k, a in c.arrays.items() if k != weights(c)}),
        r"there is no array '.*' \(weights\)",
    ),
    "weights with fewer rows": (
        lambda c: with_array(c, weights(c), c.arrays[weights(c)][:1]),
        r"its plan reads rows \[.*\] of 1 in array",
    ),
    "weights with fewer columns": (
        lambda c: with_array(c, weights(c), c.arrays[weights(c)][:, :3]),
        r"has shape \(\d+, 3\); need 2 axes, the last one a divisor of 512 slots",
    ),
    "weights that are no numbers": (
        lambda c: with_array(c, weights(c), c.arrays[weights(c)] * np.nan),
        "holds something that is no finite number",
    ),
    "layout of another ring": (
        lambda c: with_layout(c, "outputs", lambda a: a[:, : SLOTS // 2]),
        r"layout 'output' is int32 \(1, 256\); need integers of shape \(1, 512\)",
    ),
    "layout beyond the tensor": (
        lambda c: with_layout(c, "outputs", out_of_range),
        r"layout 'output' holds indices -?\d+ to 99; the tensor's are 0 to 32, exclusive",
    ),
    "layout without some elements": (
        lambda c: with_layout(c, "inputs", lambda a: np.where(a == 5, -1, a)),
        r"input 'x': 1 of 32 elements lie in no slot of layout 'input'",
    ),
    "layout of a value, cut": (
        lambda c: with_array(c, first(c, "linear").layout or "layout.0", np.zeros(3, dtype=np.int32)),
        r"layout 'layout\.\d+' is int32 \(3,\); need integers of shape \(512,\)",
    ),
    "runs that lose a step": (
        lambda c: with_attrs(c, first(c, "rotate_sum"), runs=[1] * (len(first(c, "rotate_sum").attrs["steps"]) - 1)),
        r"= rotate_sum\(.*: runs \[.*\] for \d+ steps",
    ),
    "rotation key missing": (without_key, KEY_MISSING),
    "rotation key too low": (
        lambda c: with_dearest_key(c, -1),
        r"rotation by \d+ is used at level (\d+); its key .* for level \d+",
    ),
    "rotation key too high": (
        lambda c: with_dearest_key(c, 1),
        r"rotation by \d+ is used at most at level \d+; the circuit's list wants a key for level \d+, \S+ MB: compile again",
    ),
    "rotation keys for nothing": (
        with_needless_keys,
        r"rotation by 5 is used by no op; the circuit's list wants a key for level 1, \S+ MB: compile again",
    ),
    "product key too low": (
        lambda c: replace(c, relin_level=c.relin_level - 1),
        r"a product at level \d+ is relinearised; the circuit's key is for level \d+",
    ),
    "product key too high": (
        lambda c: replace(c, relin_level=c.relin_level + 1),
        r"relinearisation is used at most at level \d+; the circuit's list wants a key for level \d+, \S+ MB: compile again",
    ),
    "levels raised above the keys": (higher, r"rotation by \d+ is used at level \d+; its key .* for level \d+"),
    "a backend of nobody": (
        lambda c: replace(c, params=replace(c.params, backend="seal")),
        r"parameters are for backend 'seal'; known are openfhe, tenseal",
    ),
}


@pytest.mark.parametrize("name", BY_THE_LOADER)
def test_the_loader_refuses(compiled, tmp_path, name):
    change, says = BY_THE_LOADER[name]
    change(compiled[0].circuit).save(tmp_path / "c")
    with pytest.raises(WireError, match=says):
        Circuit.load(tmp_path / "c")


def lowered_bound(circuit):
    op = first(circuit, "mul")
    return with_op(circuit, op, bound=op.bound / 2)


def permuted(layout):
    """Two elements trade places: every index is there, in a wrong slot."""
    return np.where(layout == 3, 7, np.where(layout == 7, 3, layout))


BY_THE_VERIFIER = {
    "rotation key missing": (without_key, KEY_MISSING),
    "bound lowered": (lowered_bound, r"= mul\(.*: a slot reaches \S+, above its bound \S+"),
    "weights changed": (
        lambda c: with_array(c, weights(c), c.arrays[weights(c)] * 1.001),
        r"output 'y' differs from the graph by \S+ of its size|above its bound",
    ),
    "scale of the output and its op": (
        lambda c: with_op(
            with_signature(c, "outputs", factor=2 * c.outputs[0].factor), c.ops[-1], factor=2 * c.ops[-1].factor
        ),
        "output 'y' differs from the graph by 1.00e",
    ),
    "layout permuted": (lambda c: with_layout(c, "outputs", permuted), "output 'y' differs from the graph by"),
    "a form that the loader refuses": (lambda c: without(c, "output"), "its layout has 1"),
}


@pytest.mark.parametrize("name", BY_THE_VERIFIER)
def test_the_verifier_refuses(compiled, name):
    change, says = BY_THE_VERIFIER[name]
    model, samples = compiled
    with pytest.raises(verify.VerificationError, match=says):
        verify.finished(change(model.circuit), model.graph, samples)


def test_a_sound_circuit_passes_both(compiled, tmp_path):
    model, samples = compiled
    assert [*faults(model.circuit), *key_faults(model.circuit)] == []
    verify.finished(model.circuit, model.graph, samples)
    model.circuit.save(tmp_path / "c")
    assert Circuit.load(tmp_path / "c").sha256 == model.circuit.sha256


def in_header(change):
    """An edit of the header's JSON; the arrays stay."""

    def edit(data):
        length = int.from_bytes(data[8:16], "little")
        header = json.loads(data[16 : 16 + length])
        change(header)
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        return data[:8] + len(text).to_bytes(8, "little") + text + data[16 + length :]

    return edit


def flipped(data):
    """One bit of the first array, whose bytes follow the header."""
    at = 16 + int.from_bytes(data[8:16], "little")
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# Edits of the bytes of a file, whose author did not know its hash.
IN_THE_FILE = {
    "a level": (in_header(lambda h: h["ops"][3].update(level=h["ops"][3]["level"] + 1)), "content hashes to"),
    "the scale": (
        in_header(lambda h: h["params"].update(scale_bits=h["params"]["scale_bits"] - 5)),
        "content hashes to",
    ),
    "a bound": (in_header(lambda h: h["ops"][3].update(bound=0.5 * h["ops"][3]["bound"])), "content hashes to"),
    "a key": (in_header(lambda h: h["keys"].popitem()), "content hashes to"),
    "the promised error": (in_header(lambda h: h.update(error_bound=1e-9)), "content hashes to"),
    "the hash": (in_header(lambda h: h.update(content_sha256="0" * 64)), r"the file says 0{16}\.\.: it was changed"),
    "no hash": (in_header(lambda h: h.pop("content_sha256")), "malformed circuit: KeyError"),
    "one bit of the arrays": (flipped, "content hashes to"),
    "the last kilobyte": (lambda data: data[:-1024], r"ends at byte \d+ of \d+: truncated"),
    "all behind the preamble": (lambda data: data[:16], r"header of \d+ bytes in a file of 16"),
}


@pytest.mark.parametrize("name", IN_THE_FILE)
def test_a_changed_file_is_refused(compiled, tmp_path, name):
    change, says = IN_THE_FILE[name]
    path = tmp_path / "c"
    compiled[0].circuit.save(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(WireError, match=says):
        Circuit.load(path)
