"""Every op that the importer reads: one tiny ONNX file each, the graph's meaning against onnxruntime."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compiler.ir import evaluate
from compiler.onnx_import import import_onnx
from compiler.ops import maps
from he_backend.base import UnsupportedOpError


class Model:
    """One ONNX graph with input `x`: every op returns the name of its (first) result."""

    def __init__(self, shape, *, opset=17):
        self.shape, self.opset = shape, opset
        self.nodes, self.constants = [], []
        self.rng = np.random.default_rng(5)

    def normal(self, *shape):
        return self.rng.normal(size=shape)

    def op(self, kind, *inputs, outputs=1, **attributes):
        names = []
        for value in inputs:
            if not isinstance(value, str):
                array = np.asarray(value)
                kinds = {"f": np.float32, "i": np.int64, "b": np.bool_}
                name = f"c{len(self.constants)}"
                self.constants.append(numpy_helper.from_array(array.astype(kinds[array.dtype.kind]), name))
                value = name
            names.append(value)
        made = [f"{kind.lower()}{len(self.nodes)}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, names, made, name=f"{len(self.nodes)}.{kind}", **attributes))
        return made[0] if outputs == 1 else made

    def save(self, path, output, functions=(), kind=TensorProto.FLOAT):
        graph = helper.make_graph(
            self.nodes,
            "test",
            [helper.make_tensor_value_info("x", kind, self.shape)],
            [helper.make_empty_tensor_value_info(output)],
            self.constants,
        )
        domains = sorted({n.domain for n in self.nodes} - {""})
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in domains)],
            ir_version=8,
            functions=list(functions),
        )
        onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
        return path


def check(path, shape, tolerance=1e-6):
    """The imported graph against onnxruntime on one input, relative to the largest element; returns the graph."""
    import onnxruntime

    graph = import_onnx(path)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    session = onnxruntime.InferenceSession(str(path))
    wanted = session.run(None, {session.get_inputs()[0].name: x})[0]
    got = evaluate(graph, x.astype(np.float64))[graph.output]
    assert got.shape == graph.shape(graph.output) == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.max(np.abs(wanted)))
    return graph


def conv(weight, **attributes):
    return lambda m: m.op("Conv", "x", m.normal(*weight), m.normal(weight[0]), **attributes)


def pool(**attributes):
    return lambda m: m.op("AveragePool", "x", **attributes)


def one(kind, *inputs, **attributes):
    """An op of x and constants."""
    return lambda m: m.op(kind, "x", *inputs, **attributes)


def pair(kind, first, second, **attributes):
    """An op of two encrypted tensors, both reshapes of multiples of x."""

    def make(m):
        a = m.op("Reshape", m.op("Mul", "x", m.normal(*m.shape)), np.array(first))
        b = m.op("Reshape", m.op("Mul", "x", m.normal(*m.shape)), np.array(second))
        return m.op(kind, a, b, **attributes)

    return make


def constant_first(kind, *shape, **attributes):
    return lambda m: m.op(kind, m.normal(*shape), "x", **attributes)


def constant_second(kind, *shape, **attributes):
    return lambda m: m.op(kind, "x", m.normal(*shape), **attributes)


def gemm(a, b, c, **attributes):
    """A, B and C are "x" or the shape of a constant."""
    return lambda m: m.op("Gemm", *(v if v == "x" else m.normal(*v) for v in (a, b, c)), **attributes)


def batch_normalization(m):
    channels = m.shape[1]
    variance = m.rng.uniform(0.5, 2, channels)
    return m.op("BatchNormalization", "x", *(m.normal(channels) for _ in range(3)), variance, epsilon=1e-3)


def split_and_join(m):
    a, b, c = m.op("Split", "x", np.array([1, 2, 3]), outputs=3, axis=2)
    return m.op("Concat", b, m.normal(1, 4, 2), m.op("Mul", a, c), b, axis=-1)


def flatten_by_its_shape(m):
    """Reshape to [batch, -1] with the batch read from Shape, as torch writes x.view(x.size(0), -1)."""
    batch = m.op("Unsqueeze", m.op("Gather", m.op("Shape", "x"), np.array(0), axis=0), np.array([0]))
    return m.op("Reshape", "x", m.op("Concat", batch, np.array([-1]), axis=0))


def expand_by_its_shape(m):
    """A mask made of ConstantOfShape, Range, Equal, Where and Expand, which all are constants here."""
    length = m.op("Gather", m.op("Shape", "x"), np.array(1), axis=0)
    steps = m.op("Range", np.array(0), length, np.array(1))
    even = m.op("Equal", m.op("Mod", steps, np.array(2)), np.array(0))
    ones = m.op("ConstantOfShape", m.op("Unsqueeze", length, np.array([0])))
    mask = m.op("Where", even, m.op("Add", ones, np.array(0.5)), np.array(2.0))
    return m.op("Mul", "x", m.op("Unsqueeze", m.op("Cast", mask, to=TensorProto.FLOAT), np.array([0, 2])))


def where(m):
    return m.op("Where", m.rng.uniform(size=(3, 4)) < 0.5, "x", np.array(-2.5))


IMAGE, LINE, TOKENS, FLAT = (1, 4, 6, 7), (1, 3, 9), (1, 4, 6), (1, 12)
CASES = {
    "conv 1-D": (LINE, conv((4, 3, 3))),
    "conv 2-D, padded unevenly": (IMAGE, conv((3, 4, 3, 3), pads=[1, 0, 2, 1])),
    "conv strided": (IMAGE, conv((3, 4, 3, 2), strides=[2, 3])),
    "conv dilated": (IMAGE, conv((3, 4, 3, 2), dilations=[2, 3])),
    "conv grouped": (IMAGE, conv((6, 2, 3, 3), group=2, strides=[1, 2], pads=[1, 1, 1, 1])),
    "conv depthwise, causal": (LINE, conv((3, 1, 3), group=3, pads=[2, 0])),
    "conv same upper": (IMAGE, conv((2, 4, 3, 2), auto_pad="SAME_UPPER", strides=[2, 2])),
    "conv same lower": (IMAGE, conv((2, 4, 2, 2), auto_pad="SAME_LOWER")),
    "average pool": (IMAGE, pool(kernel_shape=[2, 3], strides=[2, 2])),
    "average pool 1-D": (LINE, pool(kernel_shape=[3])),
    "average pool, pads not counted": (IMAGE, pool(kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2])),
    "average pool, pads counted": (IMAGE, pool(kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)),
    "average pool, ceil": (IMAGE, pool(kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)),
    "global average pool": (IMAGE, one("GlobalAveragePool")),
    "batch normalization": (IMAGE, batch_normalization),
    "batch normalization, 1-D": (FLAT, batch_normalization),
    "slice": (IMAGE, one("Slice", np.array([1, -1]), np.array([5, -9]), np.array([2, 3]), np.array([2, -2]))),
    "split and concat": (TOKENS, split_and_join),
    "expand": ((1, 4, 1), one("Expand", np.array([1, 4, 3]))),
    "tile": (TOKENS, one("Tile", np.array([1, 2, 1]))),
    "pad": (TOKENS, one("Pad", np.array([0, 1, 0, 0, 2, 3]), np.array(1.5))),
    "pad, cropped": (TOKENS, one("Pad", np.array([0, -1, 0, 0, 2, 0]))),
    "pad, reflected": (TOKENS, one("Pad", np.array([0, 1, 2, 0, 0, 3]), mode="reflect")),
    "cumsum": (TOKENS, one("CumSum", np.array(1))),
    "cumsum, exclusive and reversed": (TOKENS, one("CumSum", np.array(-1), exclusive=1, reverse=1)),
    "flatten": (IMAGE, one("Flatten", axis=-2)),
    "squeeze": ((1, 4, 1, 3), one("Squeeze", np.array([2]))),
    "unsqueeze": (TOKENS, one("Unsqueeze", np.array([0, -1]))),
    "transpose": (TOKENS, one("Transpose", perm=[2, 0, 1])),
    "reshape with 0 and -1": (TOKENS, one("Reshape", np.array([0, 2, -1]))),
    "gather the last token": (TOKENS, one("Gather", np.array(-1), axis=1)),
    "gather many, repeated": (TOKENS, one("Gather", np.array([[0, 2], [2, 5]]), axis=2)),
    "gather elements": (TOKENS, one("GatherElements", np.array([[[1, 0, 3, 3, 2, 1]]]), axis=1)),
    "trilu": ((1, 5, 5), one("Trilu", upper=0)),
    "depth to space": (IMAGE, one("DepthToSpace", blocksize=2)),
    "where of a constant mask": ((1, 3, 4), where),
    "sum over channels": (IMAGE, one("ReduceSum", np.array([1]), keepdims=1)),
    "sum over all": (TOKENS, one("ReduceSum", keepdims=0)),
    "sum over the last, dropped": (TOKENS, one("ReduceSum", np.array([-1]), keepdims=0)),
    "mean over tokens": (TOKENS, one("ReduceMean", axes=[1], keepdims=0)),
    "mean over two axes": (IMAGE, one("ReduceMean", axes=[-1, -2], keepdims=1)),
    "mean over the last, dropped": (TOKENS, one("ReduceMean", axes=[2], keepdims=0)),
    "sum of squares": (TOKENS, one("ReduceSumSquare", axes=[2])),
    "constant minus": (TOKENS, constant_first("Sub", 6)),
    "minus a constant": (TOKENS, constant_second("Sub", 4, 1)),
    "divided by a constant": (TOKENS, one("Div", np.array([1.0, 2, -3, 4, 5, 6]))),
    "power": (TOKENS, one("Pow", np.array(3.0))),
    "sum of three": (TOKENS, lambda m: m.op("Sum", "x", m.normal(6), m.op("Neg", m.op("Mul", "x", "x")))),
    "constant larger than x": ((1, 4, 1), constant_second("Mul", 1, 4, 3)),
    "matmul": (TOKENS, constant_second("MatMul", 6, 5)),
    "matmul, constant left": (TOKENS, constant_first("MatMul", 3, 4)),
    "matmul, batched constant": ((1, 3, 4, 6), constant_second("MatMul", 3, 6, 2)),
    "matmul, batched constant left": (TOKENS, constant_first("MatMul", 2, 5, 4)),
    "matmul, vector": (TOKENS, constant_second("MatMul", 6)),
    "matmul, vector left": (TOKENS, constant_first("MatMul", 4)),
    "matmul of encrypted": (TOKENS, pair("MatMul", [1, 2, 4, 3], [2, 3, 4])),
    "gemm": (FLAT, gemm("x", (12, 5), (5,), alpha=0.5, beta=2.0)),
    "gemm, B transposed": (FLAT, gemm("x", (5, 12), (1, 5), transB=1)),
    "gemm, A transposed": ((4, 3), gemm("x", (4, 5), (3, 5), transA=1)),
    "gemm, constant left": ((3, 4), gemm((3, 5), "x", (5, 4), transA=1)),
    "gemm of encrypted": ((4, 4), gemm("x", "x", "x", transB=1, alpha=0.5, beta=-1.0)),
    "einsum, linear": (TOKENS, constant_second("Einsum", 6, 5, equation="btd,df->btf")),
    "einsum, linear, transposed": (TOKENS, constant_second("Einsum", 5, 6, equation="...d,fd->...f")),
    "einsum, constant, general": (TOKENS, constant_first("Einsum", 4, 2, 6, equation="thd,btd->bth")),
    "einsum, implicit": (TOKENS, constant_second("Einsum", 6, 3, equation="abz,zc")),
    "einsum of one": (TOKENS, one("Einsum", equation="btd->bd")),
    "einsum, scores": (TOKENS, pair("Einsum", [1, 4, 2, 3], [1, 4, 2, 3], equation="bqhd,bkhd->bhqk")),
    "einsum, values": ((1, 4, 8), pair("Einsum", [1, 2, 4, 4], [1, 4, 2, 4], equation="bhqk,bkhd->bqhd")),
    "einsum, elementwise": (TOKENS, pair("Einsum", [1, 4, 6], [1, 4, 6], equation="...,...->...")),
    "einsum, outer": ((1, 4), pair("Einsum", [1, 4], [1, 4], equation="bi,bj->bji")),
    "einsum, two axes summed": (TOKENS, pair("Einsum", [4, 2, 3], [4, 3, 2], equation="aij,bji->ab")),
    "shape arithmetic": (IMAGE, flatten_by_its_shape),
    "mask made of its shape": (TOKENS, expand_by_its_shape),
    "dropout and cast": (TOKENS, lambda m: m.op("Cast", m.op("Dropout", "x"), to=TensorProto.FLOAT)),
}


@pytest.mark.parametrize("name", CASES)
def test_op_means_what_onnxruntime_computes(tmp_path, name):
    shape, make = CASES[name]
    m = Model(shape)
    check(m.save(tmp_path / "m.onnx", make(m)), shape)


def test_a_gemm_without_its_third_operand_has_none(tmp_path):
    """beta = 0: a product by zero would be refused later."""
    m = Model((4, 4))
    graph = check(m.save(tmp_path / "m.onnx", gemm("x", "x", "x", beta=0.0)(m)), (4, 4))
    assert [n.op for n in graph.nodes] == ["matmul", "reshape"]


# Refusals: each names the node and what to do instead


def divided(m):
    return m.op("Div", "x", m.op("Mul", "x", "x"))


REFUSED = {
    **{
        kind: (one(kind), rf"'0.{kind}' is a {kind}, .*fitted polynomial activation.*--approximate")
        for kind in ("Relu",)
    },
    **{
        kind: (one(kind), rf"'0.{kind}' is a {kind}, .*activation.*--approximate")
        for kind in ("Erf", "Sigmoid", "Tanh")
    },
    "Exp": (one("Exp"), "trained range.*--approximate"),
    "Sqrt": (one("Sqrt"), "inverse square root.*--approximate"),
    "Reciprocal": (one("Reciprocal"), "polynomial reciprocal"),
    "Softmax": (one("Softmax"), "power_softmax"),
    "LayerNormalization": (constant_second("LayerNormalization", 6), "inverse square root"),
    "quotient": (divided, "'1.Div' is a Div, .*polynomial reciprocal.*--approximate"),
    "zero divisor": (one("Div", np.array([1.0, 0, 1, 1, 1, 1])), "a zero"),
    "fractional power": (one("Pow", np.array(1.5)), "exponent 1.5; only whole exponents"),
    "enormous power": (one("Pow", np.array(1e9)), r"exponent 1e\+09; at most 256 is compiled"),
    "many exponents": (one("Pow", np.array([1.0, 2, 1, 1, 1, 1])), "exponent nan"),
    "max": (one("Max", np.array(0.0)), "a maximum is not a polynomial"),
    "max pool": (lambda m: m.op("MaxPool", "x", kernel_shape=[2]), "AveragePool"),
    "encrypted condition": (lambda m: m.op("Where", m.op("Cast", "x", to=TensorProto.BOOL), "x", "x"), "cannot round"),
    "encrypted weight": (
        lambda m: m.op("Conv", "x", m.op("Reshape", "x", np.array([6, 4, 1]))),
        "weight .* depends on",
    ),
    "infinite mask": (lambda m: m.op("Where", np.tri(4, 6) > 0, "x", np.array(-np.inf)), "infinite numbers"),
    "encrypted index": (
        lambda m: m.op("Gather", m.normal(4, 2), m.op("Cast", "x", to=TensorProto.INT64)),
        "cannot round",
    ),
    "einsum of three": (lambda m: m.op("Einsum", "x", "x", "x", equation="btd,btd,btd->bt"), "3 tensors"),
    "diagonal": (lambda m: m.op("Einsum", m.op("Slice", "x", [0], [4], [2]), equation="bii->bi"), "diagonal"),
    "sum of one alone": (lambda m: m.op("Einsum", "x", "x", equation="btd,bsc->bts"), "sums an axis of one alone"),
    "random": (lambda m: m.op("Add", "x", m.op("RandomNormal", shape=[6])), "RandomNormal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_node_and_the_way_out(tmp_path, name):
    make, says = REFUSED[name]
    m = Model(TOKENS)
    with pytest.raises(UnsupportedOpError, match=says):
        import_onnx(m.save(tmp_path / "m.onnx", make(m)))


def test_a_matrix_too_large_is_refused_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "MAX_ENTRIES", 500)
    m = Model(TOKENS)
    with pytest.raises(UnsupportedOpError, match=r"'0.MatMul' .* matrix of 720 entries; at most 500"):
        import_onnx(m.save(tmp_path / "m.onnx", m.op("MatMul", m.normal(30, 4), "x")))


# Local functions, older and newer opsets


def test_local_functions_are_inlined_and_polynomials_kept(tmp_path):
    from polyformer.export import polynomial_function

    body = [
        helper.make_node("Mul", ["a", "b"], ["ab"]),
        helper.make_node("Polynomial_power_2", ["ab", "one", "zero", "zero", "one", "one"], ["y"], domain="polyformer"),
    ]
    outer = helper.make_function(
        "mine",
        "Gate",
        ["a", "b", "zero", "one"],
        ["y"],
        body,
        [helper.make_opsetid(d, v) for d, v in (("", 17), ("polyformer", 1))],
    )
    m = Model(TOKENS)
    y = m.op("Gate", "x", m.normal(6), np.array(0.0), np.array(1.0), domain="mine")
    y = m.op("Polynomial_power_2", y, *(np.array(v) for v in (1.0, 0.0, 0.1, 0.5, 0.25)), domain="polyformer")
    functions = [outer, polynomial_function("power", 2)]
    graph = check(m.save(tmp_path / "m.onnx", y, functions), TOKENS)
    assert [n.op for n in graph.nodes] == ["mul_const", "polynomial", "polynomial"]


OPSETS = {
    "sum, axes as attribute": (11, lambda m: m.op("ReduceSum", "x", axes=[1])),
    "mean, axes as input": (18, lambda m: m.op("ReduceMean", "x", np.array([1, 2]), keepdims=0)),
    "squeeze, axes as attribute": (11, lambda m: m.op("Squeeze", m.op("Unsqueeze", "x", axes=[1]), axes=[1])),
    "split, sizes as attribute": (11, lambda m: m.op("Split", "x", outputs=2, axis=1, split=[1, 3])[1]),
    "split in equal parts": (18, lambda m: m.op("Split", "x", outputs=2, axis=2, num_outputs=2)[1]),
    "pad, axes as input": (18, lambda m: m.op("Pad", "x", np.array([1, 2]), "", np.array([-1]))),
    "pad, attributes": (2, lambda m: m.op("Pad", "x", pads=[0, 1, 0, 0, 0, 2], value=0.5)),
    "all of it, empty axes": (18, lambda m: m.op("ReduceSum", "x", keepdims=0)),
}


@pytest.mark.parametrize("name", OPSETS)
def test_opsets_that_moved_an_attribute(tmp_path, name):
    opset, make = OPSETS[name]
    m = Model(TOKENS, opset=opset)
    check(m.save(tmp_path / "m.onnx", make(m)), TOKENS)


def test_embedding_of_cast_ids(tmp_path):
    import onnxruntime

    m = Model((1, 5))
    table = m.normal(7, 3)
    y = m.op("Add", m.op("Gather", table, m.op("Cast", "x", to=TensorProto.INT32)), m.normal(5, 3))
    path = m.save(tmp_path / "m.onnx", y, kind=TensorProto.INT64)
    graph, ids = import_onnx(path), np.array([[3, 0, 6, 6, 1]])
    wanted = onnxruntime.InferenceSession(str(path)).run(None, {"x": ids})[0]
    np.testing.assert_allclose(evaluate(graph, ids)[graph.output], wanted, atol=1e-6)
    assert [n.op for n in graph.nodes] == ["gather", "add_const"]
