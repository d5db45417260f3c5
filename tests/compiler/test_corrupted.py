"""A corrupted circuit is refused in a sentence: by the loader where the file alone can tell, by the verifier where the model must.

One table for all circuits: a leveled one, one with refreshes, one decoding step with states, and one that is refreshed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from compiler import Target, compile_onnx, verify
from compiler.samples import Sequences, requests
from he_backend import refresh
from he_backend.base import WireError
from he_backend.circuit import Circuit
from he_backend.circuit_check import faults, traced_faults

from .corrupting import (
    first,
    higher,
    out_of_range,
    permuted,
    reply,
    weights,
    with_another,
    with_array,
    with_attrs,
    with_dearest_key,
    with_layout,
    with_needless_keys,
    with_op,
    with_signature,
    without,
    without_key,
)
from .corrupting_steps import OF_KEPT, OF_LEVELED_STEPS, OF_STEPS
from .models import norm_mlp
from .test_deepen import deepened

LOG_N = 10
SLOTS = 512


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A circuit as the compiler made it, and the check that the compiler ends with."""

    circuit: Circuit
    check: Callable[[Circuit], None]


def leveled(folder):
    samples = np.random.default_rng(1).normal(0, 0.5, (4, 4, 8)).astype(np.float32)
    model = compile_onnx(
        norm_mlp(folder / "m.onnx", layer_norm=True, width=8), samples, target=Target(insecure_log_n=LOG_N)
    )
    return Sound(circuit=model.circuit, check=lambda c: verify.finished(c, model.graph, requests(samples)))


def refreshing(folder):
    samples = list(np.random.default_rng(1).normal(0, 0.5, (4, 4, 8)))
    graph, _, circuit = deepened(norm_mlp(folder / "m.onnx", layer_norm=True, width=8), samples, LOG_N)
    return Sound(circuit=circuit, check=lambda c: verify.finished(c, graph, requests(samples)))


def step(folder):
    from .test_step import CASES, compiled_step  # torch

    config, log_n = CASES["no spare copies"]
    model, tokens, _ = compiled_step(folder, config, log_n)
    samples = Sequences(graph=model.graph, tokens=tokens[None], embedding=model.embedding)
    return Sound(circuit=model.circuit, check=lambda c: verify.finished(c, model.graph, samples.few(1)))


def deep_step(folder):
    from .test_deep_step import deep_step  # torch

    deep = deep_step(folder, blocks=1)
    return Sound(circuit=deep.circuit, check=lambda c: verify.finished(c, deep.compiled.graph, deep.sequences.few(1)))


CIRCUITS = {f.__name__: f for f in (leveled, refreshing, step, deep_step)}
EVERY = tuple(CIRCUITS)[:-1]  # the last one has nothing but what some of these have


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """By name; each is compiled once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = CIRCUITS[name](tmp_path_factory.mktemp("m"))
        return made[name]

    return of


def on_each(table, others=()):
    """Every corruption of a table on each circuit, and those of one kind of circuit on that alone."""
    rows = [(circuit, name, row) for circuit in EVERY for name, row in table.items()]
    rows += [(circuit, name, row) for circuit, more in others for name, row in more.items()]
    return pytest.mark.parametrize(
        ("circuit", "row"), [pytest.param(c, row, id=f"{c}: {name}") for c, name, row in rows]
    )


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
        lambda c: with_op(with_signature(c, "outputs", level=-1), reply(c), level=-1),
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
    "output removed": (lambda c: without(c, "output"), r"output '.*': ciphertexts \[\] are there; its layout has 1"),
    "input renamed": (
        lambda c: with_attrs(c, first(c, "input"), name="z"),
        r"input '.*': ciphertexts \[\] are there; its layout has 1",
    ),
    "an output twice": (
        lambda c: with_another(c, first(c, "output", last=True)),
        r"output '.*': ciphertexts \[0, 0\] are there; its layout has 1",
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
        r"layout 'output' holds indices -?\d+ to 99; the tensor's are 0 to \d+, exclusive",
    ),
    "layout without some elements": (
        lambda c: with_layout(c, "inputs", lambda a: np.where(a == 5, -1, a)),
        r"input '.*': 1 of \d+ elements lie in no slot of layout 'input'",
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


def refreshed(circuit):
    """The operand of the first refresh."""
    return circuit.ops[first(circuit, "refresh").args[0]]


def without_a_key_of_the_refresh(circuit):
    """One that no op but the refresh uses, if there is one: slots to coefficients has many."""
    needed = refresh.rotations(circuit.params)
    k = max(needed, key=lambda k: (needed[k] == circuit.keys[k], k))
    return replace(circuit, keys={a: level for a, level in circuit.keys.items() if a != k})


OF_REFRESHES = {
    "a refresh above what it reaches": (
        lambda c: with_op(c, first(c, "refresh"), level=c.params.refresh_output + 1),
        r"= refresh\(.*: a refresh reaches level \d+",
    ),
    "refreshed at too low a level": (
        lambda c: with_op(c, refreshed(c), level=c.params.refresh_input - 1),
        r"= refresh\(.* needs its operand at level \d+; %\d+ has \d+",
    ),
    "a refresh of nobody": (
        lambda c: with_attrs(c, first(c, "refresh"), kind="sparse"),
        "a refresh is plain, pair, functional, not 'sparse'",
    ),
    "a plain refresh of two": (
        lambda c: with_op(c, first(c, "refresh"), args=(refreshed(c).id, 0)),
        "a refresh takes 1 operands, not 2",
    ),
    "half of a pair alone": (
        lambda c: with_attrs(c, first(c, "refresh"), kind="pair"),
        "a refresh takes 2 operands, not 1",
    ),
    "a function without its series": (
        lambda c: with_attrs(c, first(c, "refresh"), kind="functional", scale=0.5),
        "a refresh needs the attribute 'fourier'",
    ),
    "a function where the context has none": (
        lambda c: with_attrs(
            higher(c), first(higher(c), "refresh"), kind="functional", scale=0.5, fourier=[[0.5, 0.0]]
        ),
        "plain and functional refreshes exclude each other",
    ),
    "parameters without a refresh": (
        lambda c: replace(c, params=replace(c.params, refresh_encode=0, refresh_decode=0, refresh_slots=0)),
        r"= refresh\(.*: .* has no refresh: give it a refresh budget",
    ),
    "a period that values do not have": (
        lambda c: replace(c, params=replace(c.params, refresh_slots=8)),
        "its slots do not repeat with the refresh's period 8",
    ),
    "values beyond a refresh's interval": (
        lambda c: with_op(c, refreshed(c), bound=1.5),
        r"= refresh\(.*: %\d+ reaches 1.5; a refresh keeps slots within \[-1, 1\]",
    ),
    "rotation key of a refresh missing": (without_a_key_of_the_refresh, KEY_MISSING),
}


@on_each(
    BY_THE_LOADER,
    [
        *((name, OF_REFRESHES) for name in ("refreshing", "deep_step")),
        *((name, OF_STEPS) for name in ("step", "deep_step")),
        ("step", OF_LEVELED_STEPS),
    ],
)
def test_the_loader_refuses(sound, tmp_path, circuit, row):
    change, says = row
    change(sound(circuit).circuit).save(tmp_path / "c")
    with pytest.raises(WireError, match=says):
        Circuit.load(tmp_path / "c")


def lowered_bound(circuit):
    op = first(circuit, "mul")
    return with_op(circuit, op, bound=op.bound / 2)


AT = r"( of step \d)?"
BY_THE_VERIFIER = {
    "rotation key missing": (without_key, KEY_MISSING),
    "bound lowered": (lowered_bound, rf"= mul\(.*: a slot reaches \S+{AT}, above its bound \S+"),
    "bound of an input's signature lowered": (
        lambda c: with_signature(c, "inputs", bound=0.5 * c.inputs[0].bound),
        rf"'x' reaches \S+{AT}, above the \S+ of its signature",
    ),
    "bound of the output's signature lowered": (
        lambda c: with_signature(c, "outputs", bound=0.5 * c.outputs[0].bound),
        rf"'y' reaches \S+{AT}, above the \S+ of its signature",
    ),
    "weights changed": (
        lambda c: with_array(c, weights(c), c.arrays[weights(c)] * 1.001),
        rf"output '.*'{AT} differs from the graph by \S+ of its size|above its bound",
    ),
    "scale of the output and its op": (
        lambda c: with_op(
            with_signature(c, "outputs", factor=2 * c.outputs[0].factor), reply(c), factor=2 * reply(c).factor
        ),
        rf"'y'({AT} differs from the graph by 1.00e| reaches \S+{AT}, above the \S+ of its signature)",
    ),
    "layout permuted": (lambda c: with_layout(c, "outputs", permuted), rf"output 'y'{AT} differs from the graph by"),
    "a form that the loader refuses": (lambda c: without(c, "output"), "its layout has 1"),
}


@on_each(
    {},
    [
        *((name, BY_THE_VERIFIER) for name in CIRCUITS),
        *((name, OF_REFRESHES) for name in ("refreshing", "deep_step")),
        *((name, rows) for name in ("step", "deep_step") for rows in (OF_STEPS, OF_KEPT)),
        ("step", OF_LEVELED_STEPS),
    ],
)
def test_the_verifier_refuses(sound, circuit, row):
    change, says = row
    with pytest.raises(verify.VerificationError, match=says):
        sound(circuit).check(change(sound(circuit).circuit))


@pytest.mark.parametrize("name", CIRCUITS)
def test_a_sound_circuit_passes_both(sound, tmp_path, name):
    circuit = sound(name).circuit
    assert [*faults(circuit), *traced_faults(circuit)] == []
    sound(name).check(circuit)
    circuit.save(tmp_path / "c")
    again = Circuit.load(tmp_path / "c")
    assert again.sha256 == circuit.sha256 and again.errors == circuit.errors
    assert bool(circuit.refreshes) == (name in ("refreshing", "deep_step"))
    assert bool(circuit.states) == (name in ("step", "deep_step"))


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


@on_each(IN_THE_FILE)
def test_a_changed_file_is_refused(sound, tmp_path, circuit, row):
    change, says = row
    path = tmp_path / "c"
    sound(circuit).circuit.save(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(WireError, match=says):
        Circuit.load(path)
