"""Every op that the importer reads: one tiny ONNX file each, the graph's meaning against onnxruntime."""

import numpy as np
import pytest

from compiler.ir import evaluate
from compiler.onnx_import import import_onnx

from .models import Builder

RNG = np.random.default_rng(5)


def conv(shape, weight, bias=None, **attributes):
    def make(b):
        w = RNG.normal(size=weight)
        return b.op("Conv", "x", w, *([RNG.normal(size=weight[0])] if bias else []), **attributes)

    return shape, make


CASES = {
    "conv 1-D": conv((1, 3, 9), (4, 3, 3)),
    "conv 2-D, padded, bias": conv((1, 2, 5, 6), (3, 2, 3, 3), bias=True, pads=[1, 0, 2, 1]),
    "conv strided": conv((1, 2, 7, 7), (3, 2, 3, 2), strides=[2, 3]),
    "conv dilated": conv((1, 2, 8, 7), (3, 2, 3, 2), dilations=[2, 3]),
    "conv grouped": conv((1, 4, 5, 5), (6, 2, 3, 3), bias=True, group=2),
    "conv depthwise": conv((1, 4, 6), (4, 1, 3), group=4, pads=[2, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_op_means_what_onnxruntime_computes(tmp_path, name):
    import onnxruntime

    shape, make = CASES[name]
    b = Builder(shape)
    path = b.save(tmp_path / "m.onnx", make(b), None)
    graph = import_onnx(path)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    wanted = onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]
    got = evaluate(graph, x)[graph.output]
    assert got.shape == graph.shape(graph.output) == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)
