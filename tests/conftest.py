"""Settings that must hold before any test module is imported."""

import os

from hypothesis import settings

# One thread inside each operation, parallel work is the executor's. OpenFHE and PyTorch read this once, when loaded.
os.environ["OMP_NUM_THREADS"] = "1"

# Examples take as long as the cryptography does; in continuous integration the same commit must give the same verdict.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
