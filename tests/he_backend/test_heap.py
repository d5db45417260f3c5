"""A process that evaluates takes its memory before the first request, and only where the heap keeps it; its primitives have one thread."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from he_backend import heap

SIZE = 64 << 20
PROGRAM = f"""
import resource
import numpy as np
from he_backend import heap
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
heap.reserve({SIZE})
before = faults()
blocks = [np.ones(65536) for _ in range({SIZE} // 2 // 524288)]  # as limbs of N = 2^16 are
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults as Linux counts them")
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "given back"])
def test_reserved_memory_is_used_without_page_faults(kept):
    environment = {**os.environ, **(heap.ENVIRONMENT if kept else {"MALLOC_TRIM_THRESHOLD_": "131072"})}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    pages = SIZE // 2 // heap.PAGE
    assert (int(run.stdout) < pages // 10) == kept


OPENMP = """
import os
import torch
torch.set_num_threads(2)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
from he_backend.openfhe_ring import ring
from he_backend.params import Params
ring(Params(log_n=12, levels=4, scale_bits=40, first_bits=46, digits=2, insecure=True), allow_insecure=True)
print(threads() - before, torch.get_num_threads())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads as Linux lists them")
def test_primitives_have_one_thread_even_after_torch_asked_for_two():
    """Torch brings the OpenMP runtime that the library then shares, and what it asked for was taken for the library's own."""
    pytest.importorskip("torch")
    pytest.importorskip("openfhe")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    run = subprocess.run([sys.executable, "-c", OPENMP], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["0", "2"]
