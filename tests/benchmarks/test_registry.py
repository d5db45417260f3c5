"""Benchmarks by name, and each in a process of its own: what is kept when one crashes or is interrupted."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from benchmarks import entries, noise, records, registry, runner, worker
from benchmarks.registry import Benchmark, Settings
from tests.he_backend.running import ROOT

MODULES = sorted(p.stem for p in Path(entries.__file__).parent.glob("*.py") if p.stem != "__init__")


def entry(name: str) -> Benchmark:
    return Benchmark(
        name=name, group="train", measures="m", conditions="c", minutes=1, memory_gb=1, run=lambda settings: {}
    )


@pytest.fixture
def topic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Benchmarks that the worker finds under `benchmarks.entries`, as a module written by the test."""

    def make(body: str) -> list[Benchmark]:
        (tmp_path / "sitecustomize.py").write_text(
            f"import benchmarks.entries as e\ne.__path__.append({str(tmp_path / 'more')!r})\n"
        )
        more = tmp_path / "more"
        more.mkdir()
        (more / "topic.py").write_text(
            "from benchmarks import records\nfrom benchmarks.registry import Benchmark\n"
            + textwrap.dedent(body)
            + "\nBENCHMARKS = tuple(Benchmark(name=n, group='train', measures='m', conditions='c', minutes=1, memory_gb=1, run=f)"
            " for n, f in RUN.items())\n"
        )
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
        monkeypatch.setattr(entries, "__path__", [*entries.__path__, str(more)])
        registry.benchmarks.cache_clear()
        sys.modules.pop("benchmarks.entries.topic", None)
        return [b for b in registry.benchmarks().values() if b.name.startswith("t-")]

    yield make
    monkeypatch.undo()
    registry.benchmarks.cache_clear()
    sys.modules.pop("benchmarks.entries.topic", None)


def go(chosen: list[Benchmark], folder: Path) -> list[runner.Outcome]:
    steps: list[object] = []
    return list(
        runner.run(chosen, repeats=1, seeds=(0,), quick=False, folder=folder, progress=lambda *step: steps.append(step))
    )


@pytest.mark.parametrize("name", registry.benchmarks())
def test_every_benchmark_states_what_it_measures(name: str) -> None:
    b = registry.benchmarks()[name]
    assert b.measures and b.conditions and b.minutes > 0 and b.memory_gb > 0
    assert b.memory_gb <= 22


@pytest.mark.parametrize("module", MODULES)
def test_entries_import_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, benchmarks.entries.{module}\n"
        "print([m for m in ('torch', 'onnx', 'openfhe', 'tenseal', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_suite_ends_in_three_hours_and_leaves_out_nothing_without_saying_so() -> None:
    suite = registry.select([registry.SUITE])
    assert sum(b.minutes for b in suite) <= 180
    rest = [b for b in registry.benchmarks().values() if b not in suite]
    assert all(b.group == "train" or not b.suite for b in rest)
    assert {b.group for b in suite} == set(registry.GROUPS) - {"train"}


def test_select_takes_names_and_groups_once() -> None:
    chosen = [b.name for b in registry.select(["cnn-28", "encrypted", "cnn-28"])]
    assert chosen[0] == "cnn-28"
    assert len(chosen) == len(set(chosen)) > 2
    with pytest.raises(
        ValueError, match=r"no benchmark is called 'bogus'; known are: .*cnn-28.*groups are: primitives"
    ):
        registry.select(["bogus"])


def test_groups_and_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no group 'x'; known are: primitives"):
        Benchmark(name="a", group="x", measures="", conditions="", minutes=1, memory_gb=1, run=lambda s: {})


def test_crash_is_reported_and_the_rest_goes_on(topic, tmp_path: Path) -> None:
    chosen = topic(
        """
        import os
        def bad(settings): raise RuntimeError("seven of nine")
        def dies(settings):
            settings.keep(records.record("t-dies", metrics={"a": 1.0}, params={}, threads=1))
            os.kill(os.getpid(), 9)
        def good(settings):
            settings.progress(1, 1, "x")
            return records.record("t-good", metrics={"a": 2.0}, params={}, threads=1)
        RUN = {"t-bad": bad, "t-dies": dies, "t-good": good}
        """
    )
    bad, dies, good = go(chosen, tmp_path / "out")
    assert (bad.status, bad.path, bad.why) == ("crashed", None, "RuntimeError: seven of nine")
    assert dies.status == "crashed" and "SIGKILL" in dies.why
    assert dies.record and dies.record["metrics"] == {"a": 1.0} and dies.record["status"] == "crashed"
    assert good.status == "complete" and good.record
    assert good.record["metrics"] == {"a": 2.0} and good.record["status"] == "complete"
    assert isinstance(good.record["quiet"], bool) and good.record["conditions"] == "c"
    assert set(records.latest(tmp_path / "out")) == {"t-dies", "t-good"}


def test_ctrl_c_keeps_what_was_measured(topic, tmp_path: Path) -> None:
    chosen = topic(
        """
        import time
        def slow(settings):
            settings.keep(records.record("t-slow", metrics={"rows": [1]}, params={}, threads=1))
            settings.progress(1, 2, "kept")
            time.sleep(60)
        RUN = {"t-slow": slow, "t-z": slow}
        """
    )

    def interrupt(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt  # what Ctrl-C raises here, wherever this process was started

    start = time.perf_counter()
    outcomes = list(runner.run(chosen, repeats=1, seeds=(0,), quick=False, folder=tmp_path / "out", progress=interrupt))
    assert time.perf_counter() - start < 30
    assert [o.status for o in outcomes] == ["interrupted"]  # the second was not started
    assert outcomes[0].record and outcomes[0].record["metrics"] == {"rows": [1]}
    assert outcomes[0].record["status"] == "interrupted"


def test_quick_records_are_thrown_away(topic, tmp_path: Path) -> None:
    chosen = topic(
        """
        def good(settings): return records.record("t-q", metrics={"quick": settings.quick}, params={}, threads=1)
        RUN = {"t-q": good}
        """
    )
    (outcome,) = runner.run(chosen, repeats=1, seeds=(0,), quick=True, folder=None, progress=lambda *step: None)
    assert outcome.status == "complete" and outcome.path is None
    (outcome,) = runner.run(chosen, repeats=1, seeds=(0,), quick=True, folder=tmp_path, progress=lambda *step: None)
    assert outcome.record and outcome.record["quick"] is True


def test_noise_counts_others_and_not_oneself() -> None:
    with noise.watch() as alone:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
    burn = "import time; e = time.time() + 30\nwhile time.time() < e: pass"
    other = subprocess.Popen([sys.executable, "-c", burn])
    try:
        time.sleep(0.3)
        with noise.watch() as crowded:
            time.sleep(0.7)
    finally:
        other.kill()
        other.wait()
    if alone.share is None or crowded.share is None:
        pytest.skip("this system does not count the processors' time")
    assert crowded.others_s is not None and crowded.others_s > 0.3  # of 0.7 s
    assert not crowded.quiet


@pytest.mark.parametrize(
    ("share", "quiet"),
    [(0.0, True), (0.02, True), (0.04, False), (None, False)],
    ids=["none", "little", "some", "load"],
)
def test_quiet_by_share_then_by_load(share: float | None, quiet: bool) -> None:
    cores = os.cpu_count() or 1
    seen = noise.Noise(load_before=5.0, wall_s=10.0, others_s=None if share is None else share * 10 * cores)
    assert seen.quiet is quiet
    assert seen.to_json()["quiet"] is quiet


BROKEN = {
    "no object": ([], "list instead of an object"),
    "field absent": ({"name": "x"}, "has no 'version'"),
    "wrong kind": ({"name": 3}, "'name' is int, must be str"),
}


@pytest.mark.parametrize(("data", "says"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_record_is_refused(data: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        records.check(data, "file")


def test_a_status_that_is_none_is_refused(tmp_path: Path) -> None:
    record = records.record("x", metrics={}, params={}, threads=1) | {"status": "fine"}
    with pytest.raises(ValueError, match="'fine' is none of complete"):
        records.check(record, "file")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="no benchmark record"):
        records.read(tmp_path / "x.json")


def test_a_complete_record_is_preferred(tmp_path: Path) -> None:
    old = records.record("x", metrics={"a": 1}, params={}, threads=1) | {"created": "2020-01-01T00:00:00Z"}
    new = records.record("x", metrics={"a": 2}, params={}, threads=1) | {"status": "interrupted"}
    records.write(old, tmp_path)
    records.write(new, tmp_path)
    assert records.latest(tmp_path)["x"]["metrics"] == {"a": 1}


@pytest.mark.parametrize("path", sorted(records.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_committed_records_are_records(path: Path) -> None:
    assert not records.read(path).get("quick")


def test_a_table_keeps_its_form() -> None:
    table: dict[str, object] = {"ms": {}}
    assert worker.stamped(table, entry("x"), None, quick=False) == table


def test_settings_default_to_silence() -> None:
    settings = Settings()
    settings.progress(1, 2, "x")
    settings.keep({})
    assert settings.seeds == (0, 1, 2)
