"""A rehearsal: a process that loads one key file and may die of it, so that the server does not.

OpenFHE's keys arrive as residues, which `openfhe_bytes.py` checks as numbers; the library parses only envelopes of its own,
and needs no rehearsal. SEAL's keys arrive in SEAL's own format, so that its parser sees bytes from outside: it sees them
here first.

    python -m he_backend.keycheck PARAMS_JSON KIND K LEVEL PATH      0: a key; 1: refused, reason on stderr; else: it died
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from . import keys
from .base import HEError, WireError
from .keys import KeyFile
from .params import Params

NEEDED = frozenset({"tenseal"})  # backends whose loader parses what arrives
TIMEOUT = 300.0


def rehearse(params: Params, file: KeyFile, path: Path) -> None:
    """Load a key elsewhere, if this backend needs that.

    Raises:
        WireError: it is no key, or whoever loaded it died or did not come back.
    """
    if params.backend not in NEEDED:
        return
    command = [
        sys.executable,
        "-m",
        "he_backend.keycheck",
        json.dumps(params.to_json()),
        file.kind,
        str(file.k),
        str(file.level),
    ]
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            [*command, str(path.resolve())], cwd=root, capture_output=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise WireError(f"{file.name}: loading it took more than {TIMEOUT:.0f} s") from error
    if done.returncode == 1:
        raise WireError(f"{file.name}: {done.stderr.decode(errors='replace').strip()[-300:]}")
    if done.returncode:
        raise WireError(f"{file.name}: the process that loaded it ended with status {done.returncode}")


def main(params_json: str, kind: str, k: str, level: str, path: str) -> int:
    params = Params.from_json(json.loads(params_json))
    evaluator = keys.backend(params.backend).Evaluator(params, allow_insecure=params.insecure)
    try:
        evaluator.load_key(kind, int(k), int(level), memoryview(Path(path).read_bytes())[keys.HEADER :])
    except HEError as error:
        sys.stderr.write(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
