"""A circuit with a refresh in its middle, and a server's process that evaluates it with keys from a folder."""

import sys
from pathlib import Path

import numpy as np

from he_backend import keys
from he_backend.circuit import Circuit, Op, Signature
from he_backend.execute import Executor
from he_backend.openfhe_backend import Evaluator
from he_backend.params import Params
from he_backend.trace import trace
from tests.he_backend.small_circuit import WIDTH, diagonals, weights

REFRESHING = Params(
    log_n=10,
    levels=17,
    scale_bits=54,
    first_bits=60,
    digits=6,
    secret="sparse192",
    insecure=True,
    refresh_encode=3,
    refresh_decode=2,
)


def reference(x: np.ndarray) -> np.ndarray:
    """What the circuit computes, [WIDTH] -> [WIDTH]."""
    first, bias, _ = weights()
    return (first @ x**2 + bias) ** 2


def refreshing(params: Params = REFRESHING) -> Circuit:
    """x -> (first @ refresh(x^2) + bias)^2; it spends more levels than a ciphertext has that starts at its input's level."""
    stride = params.slots // WIDTH
    first, bias, _ = weights()
    plan = [[g * stride, [[b * stride, g + b] for b in range(4)]] for g in range(0, WIDTH, 4)]
    low, high = params.refresh_input, params.refresh_output
    ops = (
        Op(id=0, kind="input", args=(), attrs={"name": "x", "part": 0}, level=low + 1, source="x"),
        Op(id=1, kind="mul", args=(0, 0), level=low, source="/square/Mul"),
        Op(id=2, kind="refresh", args=(1,), attrs={"kind": "plain"}, level=high, source="/square/Mul"),
        Op(
            id=3,
            kind="linear",
            args=(2,),
            attrs={"plan": plan, "weights": "first", "bias": "bias"},
            level=high - 1,
            source="/up/MatMul",
        ),
        Op(id=4, kind="mul", args=(3, 3), level=high - 2, source="/again/Mul"),
        Op(id=5, kind="output", args=(4,), attrs={"name": "y", "part": 0}, level=0, source="y"),
    )
    layout = (np.arange(params.slots, dtype=np.int32) // stride).reshape(1, -1)

    def side(name: str, bound: float, level: int) -> Signature:
        return Signature(name=name, shape=(WIDTH,), layout="features", factor=1.0, bound=bound, level=level)

    draft = Circuit(
        params=params,
        ops=ops,
        arrays={"first": diagonals(first), "bias": bias},
        client_arrays={"features": layout},
        inputs=(side("x", 1.0, low + 1),),
        outputs=(side("y", 20.0, 0),),
        keys={},
        relin_level=-1,
        error_bound=2.0**-12,
    )
    found = trace(draft)
    return Circuit(**{**vars(draft), "keys": found.keys, "relin_level": found.relin_level})


def main(circuit_file: str, folder: str, request: str, reply: str) -> None:
    """python -m tests.he_backend.refreshing CIRCUIT KEYS REQUEST REPLY: residues in, residues and the exact scale out."""
    circuit = Circuit.load(Path(circuit_file))
    evaluator = Evaluator(circuit.params, allow_insecure=True)
    keys.load(evaluator, Path(folder))
    executor = Executor(circuit, evaluator, threads=2)
    executor.prepare()
    start = evaluator.import_ciphertext(np.load(request), level=circuit.inputs[0].level)
    run = executor.run({("x", 0): start})
    seconds = run.timing.primitives["refresh"]
    residues = evaluator.export_ciphertext(run.outputs["y", 0])
    np.savez(reply, residues=residues, scale=run.scales["y", 0], seconds=seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
