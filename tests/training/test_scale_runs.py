"""Whole runs: two processes as one, and runs that are killed (SIGKILL) and go on, on the curve of an untouched one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

from training import checkpoints, distributed, parallel, recipes, scale
from training.shards import write_byte_shards

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
ROOT = Path(__file__).parents[2]
RECIPE = recipes.load("tiny_cpu")
RUN = ["-m", "training.distributed", "--recipe", "tiny_cpu"]
# Dies on its way to the disk in the second checkpoint, all parts written and nothing renamed yet.
KILLED_IN_WRITE = """
import os, signal, sys
from training import checkpoints, distributed
to_disk = checkpoints._to_disk
def kill(path):
    if path.name == "step-00000020.partial":
        os.kill(os.getpid(), signal.SIGKILL)
    to_disk(path)
checkpoints._to_disk = kill
distributed.main(sys.argv[1:])
"""


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def run_here(folder: Path, data: Path, recipe: recipes.ScaleRecipe = RECIPE) -> scale.Outcome:
    with parallel.processes() as mesh:
        assert dist.get_world_size() == 1
        return scale.run(recipe, folder, data, mesh)


def curve(folder: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(t) for t in (folder / "log.jsonl").read_text().splitlines()]
    return [(x["step"], x["loss"], x["gradient"]) for x in lines]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_byte_shards(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Started:
    """A run in processes of its own: its folder, and how it ends."""

    folder: Path
    process: subprocess.Popen[str]

    def ends_with(self, code: int) -> Path:
        _, errors = self.process.communicate(timeout=300)
        assert self.process.returncode == code, errors
        return self.folder


@pytest.fixture(scope="module")
def started(tmp_path_factory, data) -> Iterator[dict[str, Started]]:
    """Three runs of the recipe side by side, since starting Python is what takes the time."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *RUN]
    commands = {"killed": RUN, "killed in write": ["-c", KILLED_IN_WRITE, "--recipe", "tiny_cpu"], "two": torchrun}
    runs = {}
    for name, command in commands.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        runs[name] = Started(folder=folder, process=start([*command, "--out", str(folder), "--data", str(data)]))
    watched, deadline = runs["killed"], time.monotonic() + 200
    log = watched.folder / "log.jsonl"
    while time.monotonic() < deadline and watched.process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= 13:
            break
        time.sleep(0.005)
    watched.process.send_signal(signal.SIGKILL)
    yield runs
    for run in runs.values():
        run.process.kill()
        run.process.communicate()


@pytest.fixture(scope="module")
def two(started) -> Path:
    """The recipe on two processes under torchrun."""
    return started["two"].ends_with(0)


@pytest.fixture(scope="module")
def one(tmp_path_factory, data) -> Path:
    """The run that nothing happens to, in one process."""
    folder = tmp_path_factory.mktemp("one")
    run_here(folder, data)
    return folder


def test_the_loss_falls(one):
    steps = curve(one)
    assert [s for s, _, _ in steps] == list(range(1, 41))
    assert steps[0][1] == pytest.approx(5.55, abs=0.3) and steps[-1][1] < 3.6


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(two, one):
    assert json.loads((two / "outcome.json").read_text())["processes"] == 2
    for expected, found in zip(curve(one), curve(two), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(two, one, data, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000040")
    outcome = run_here(tmp_path / "run", data)
    assert outcome.resumed_from == 30
    for expected, found in zip(curve(one), curve(tmp_path / "run"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_is_the_identical_curve(started, one, data):
    folder = started["killed"].ends_with(-signal.SIGKILL)
    outcome = run_here(folder, data)
    assert 10 <= outcome.resumed_from < 40
    assert curve(folder) == curve(one)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_write_leaves_the_checkpoint_before(started, one, data):
    out = started["killed in write"].ends_with(-signal.SIGKILL)
    folder = out / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000010", "step-00000020.partial"]
    assert [p.name for p in checkpoints.complete(folder)] == ["step-00000010"]
    assert run_here(out, data).resumed_from == 10
    assert curve(out) == curve(one)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000030", "step-00000040"]


def test_a_finished_run_stays_as_it_is_and_another_recipe_is_refused(one, data):
    before = curve(one)
    outcome = run_here(one, data)
    assert (outcome.resumed_from, outcome.loss) == (40, before[-1][1]) and curve(one) == before
    with pytest.raises(ValueError, match="another recipe: seed is 0 there and 1 here; resume"):
        run_here(one, data, RECIPE.with_(seed=1))
    run_here(one, data, RECIPE.with_(checkpoint_every=7))  # which decides nothing


def test_a_finished_run_keeps_its_outcome_or_writes_what_it_knows(one, data):
    """Also if it was killed after the last checkpoint and before its outcome was on disk."""
    command = ["--recipe", "tiny_cpu", "--out", str(one), "--data", str(data)]
    distributed.main(command)
    path = one / "outcome.json"
    found = json.loads(path.read_text())
    assert (found["resumed_from"], found["steps"], found["loss"]) == (40, 40, curve(one)[-1][1])
    path.write_text('{"of": "the run"}')
    distributed.main(command)
    assert path.read_text() == '{"of": "the run"}'


def test_the_lean_optimiser_resumes_exactly_in_bfloat16(data, tmp_path):
    recipe = RECIPE.with_(optimiser="factored", precision="bf16", steps=6, checkpoint_every=3, batch=4)
    run_here(tmp_path / "whole", data, recipe)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000006")
    assert run_here(tmp_path / "cut", data, recipe).resumed_from == 3
    steps = curve(tmp_path / "cut")
    assert steps == curve(tmp_path / "whole")
    assert steps[-1][1] < steps[0][1]
