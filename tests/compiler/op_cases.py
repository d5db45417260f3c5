"""Every op that the importer reads, as one tiny ONNX graph each."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


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

    def as_request(self, output):
        """The same op on x [1, ...], the one request, with a reply [1, ...]: reshapes in front and behind it."""
        inner, self.shape = self.shape, (1, int(np.prod(self.shape)))
        nodes, self.nodes = self.nodes, []
        within = self.op("Reshape", "x", np.array(inner))
        for node in nodes:
            node.input[:] = [within if name == "x" else name for name in node.input]
        self.nodes += nodes
        return self.op("Reshape", output, np.array([1, -1]))

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
    "sum to one number": (FLAT, one("ReduceSum", np.array([1]), keepdims=0)),
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
