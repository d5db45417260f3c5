"""Files as onnx-simplifier leaves them.

`data/exported.onnx` is torch 2.14's tracing exporter on the module below, with a dynamic batch, nothing folded, and the batch norm
kept (`training=TrainingMode.PRESERVE`); `data/simplified.onnx` is what `onnxsim.simplify(model, overwrite_input_shapes={"x": [1, 1,
4, 4]})` of onnxsim 0.7.3 makes of it:

    h = self.pool(self.norm(self.conv(x)) ** 2)                 Conv2d(1, 3, 3, padding=1), BatchNorm2d(3), AvgPool2d(2)
    h = h.reshape(h.shape[0], h.shape[1], -1)                   [1, 3, 4]
    a = (self.q(h) @ self.k(h).transpose(-2, -1) * h.shape[-1] ** -0.5) ** 2
    y = self.head(torch.nn.Identity()(h + self.o(a @ self.v(h))).flatten(1))
"""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from compiler import Target
from compiler.onnx_import import import_onnx
from he_backend.base import UnsupportedOpError

from .test_three_ways import three_ways

DATA = Path(__file__).parent / "data"


def ops(name: str) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(DATA / name)).graph.node)


def test_the_simplifier_did_what_the_compiler_must_take():
    before, after = ops("exported.onnx"), ops("simplified.onnx")
    for gone in ("BatchNormalization", "Shape", "Gather", "Unsqueeze", "Concat", "Constant", "Cast"):
        assert before[gone] and not after[gone]
    assert before["Gemm"] == 1 and after["Gemm"] == 5 and after["Add"] == 1
    x = np.random.default_rng(0).normal(size=(1, 1, 4, 4)).astype(np.float32)
    a, b = (
        onnxruntime.InferenceSession(str(DATA / f)).run(None, {"x": x})[0] for f in ("exported.onnx", "simplified.onnx")
    )
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_simplified_file_compiles_three_ways():
    three_ways(DATA / "simplified.onnx", Target(insecure_log_n=11))


def test_the_same_file_before_compiles_once_its_batch_is_fixed(tmp_path):
    with pytest.raises(UnsupportedOpError, match="dynamic shape; export it with fixed sizes"):
        import_onnx(DATA / "exported.onnx")
    model = onnx.load(str(DATA / "exported.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, str(tmp_path / "m.onnx"))
    three_ways(tmp_path / "m.onnx", Target(insecure_log_n=11))
