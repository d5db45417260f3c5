"""A process that evaluates takes its memory before the first request, and only where the heap keeps it."""

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
