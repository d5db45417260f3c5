"""scripts/setup finds the right interpreter, says in one sentence what is missing, and never trusts half a .venv.

The script runs in a folder of its own, with a PATH that holds only what a test puts there. Where it would install
packages, pip is kept from finding any, so that nothing is downloaded.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = "cat chmod date df dirname env flock getconf grep head mkdir mv rm sed sh sha256sum tail tee uname".split()

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="scripts/setup is for Linux")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A copy of the repository's set-up on a machine that has no Python until a test gives it one."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def complete(self) -> Path:
        return self.repository / ".venv/.complete"

    def give(self, path: str, script: str) -> None:
        """Put a shell script below the machine's folder, for example at `bin/python3.10`."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.write_text(f"#!/bin/sh\n{script}\n")
        target.chmod(0o755)

    def give_python(self, path: str, answer: str) -> None:
        """Put an interpreter there that answers the script's questions so, and can do nothing else."""
        self.give(path, f"[ $# = 3 ] && printf '{answer}' || exit 70")

    def start(self, **env: str) -> subprocess.Popen[str]:
        """Start the script in a process group of its own."""
        return subprocess.Popen(
            ["sh", "scripts/setup"],
            cwd=self.repository,
            env={"PATH": str(self.folder / "bin"), "HOME": str(self.folder / "home"), "PIP_NO_INDEX": "1"} | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def setup(self, **env: str) -> tuple[int, str]:
        """Run the script; its exit status and all that it printed."""
        process = self.start(**env)
        output, _ = process.communicate()
        return process.returncode, output


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    repository = tmp_path / "repository"
    (repository / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/setup", repository / "scripts/setup")
    shutil.copy(ROOT / "pyproject.toml", repository / "pyproject.toml")
    (tmp_path / "bin").mkdir()
    for command in COMMANDS:
        found = shutil.which(command)
        assert found, f"the tests of the set-up need {command}"
        (tmp_path / "bin" / command).symlink_to(found)
    machine = Machine(folder=tmp_path)
    machine.give("bin/getconf", "echo glibc 2.36")
    return machine


# --- Which interpreter ------------------------------------------------------------------------------------------------

FOUND = {
    "python3.10 on PATH": ("bin/python3.10", "3.10", "2.36"),
    "python3 on PATH that is 3.10": ("bin/python3", "3.10", "2.36"),
    "pyenv, not selected": ("home/.pyenv/versions/3.10.13/bin/python", "3.10", "2.36"),
    "python3.12 with a new glibc": ("bin/python3.12", "3.12", "2.39"),
    "pyenv 3.12 with a new glibc": ("home/.pyenv/versions/3.12.1/bin/python", "3.12", "2.41"),
}
NOT_FOUND = {
    "nothing": (None, "", "2.36"),
    "python3.11": ("bin/python3", "3.11", "2.36"),
    "python3.13": ("bin/python3", "3.13", "2.41"),
    "python3.12 with an old glibc": ("bin/python3.12", "3.12", "2.38"),
}


@pytest.mark.parametrize(("path", "version", "glibc"), FOUND.values(), ids=FOUND.keys())
def test_interpreter_is_found(machine: Machine, path: str, version: str, glibc: str) -> None:
    machine.give("bin/getconf", f"echo glibc {glibc}")
    machine.give_python(path, f"{version}\\n/opt/real\\n")
    _, output = machine.setup()
    assert f"setup: Python {version}: /opt/real" in output


@pytest.mark.parametrize(("path", "version", "glibc"), NOT_FOUND.values(), ids=NOT_FOUND.keys())
def test_missing_interpreter_is_one_sentence(machine: Machine, path: str | None, version: str, glibc: str) -> None:
    machine.give("bin/getconf", f"echo glibc {glibc}")
    if path:
        machine.give_python(path, f"{version}\\n/opt/real\\n")
    status, output = machine.setup()
    assert status == 1
    assert re.fullmatch(
        r"setup: OpenFHE needs CPython 3\.10 .* or 3\.12 .*none was found.*, then make again\.\n", output
    )


def test_broken_shim_is_passed_over(machine: Machine) -> None:
    machine.give("bin/python3.10", "echo 'pyenv: python3.10: command not found' >&2; exit 127")
    machine.give_python("home/.pyenv/versions/3.10.13/bin/python", "3.10\\n/opt/real\\n")
    _, output = machine.setup()
    assert "setup: Python 3.10: /opt/real" in output


REMEDIES = {
    "Ubuntu 22.04": ("ID=ubuntu\nVERSION_ID=22.04", [], "apt-get install python3.10-venv"),
    "Ubuntu 24.04": ("ID=ubuntu\nVERSION_ID=24.04", [], "apt-get install python3.12-venv"),
    "Debian 12": ("ID=debian\nVERSION_ID=12", [], "install uv"),
    "Debian 12 with pyenv on PATH": ("ID=debian\nVERSION_ID=12", ["bin/pyenv"], "pyenv install 3.10"),
    "Debian 12 with pyenv off PATH": ("ID=debian\nVERSION_ID=12", ["home/.pyenv/bin/pyenv"], "pyenv install 3.10"),
    "unknown": ("NAME=Plan9", [], "install uv"),
}


@pytest.mark.parametrize(("release", "tools", "remedy"), REMEDIES.values(), ids=REMEDIES.keys())
def test_remedy_fits_the_machine(machine: Machine, release: str, tools: list[str], remedy: str) -> None:
    (machine.folder / "os-release").write_text(release)
    for tool in tools:
        machine.give(tool, "exit 0")
    _, output = machine.setup(POLYFORMER_OS_RELEASE=str(machine.folder / "os-release"))
    assert remedy in output


def test_uv_is_asked_to_install_one(machine: Machine) -> None:
    machine.give_python("managed/python", "3.10\\n/opt/managed\\n")
    machine.give(
        "home/.local/bin/uv",
        f"""cd {machine.folder}
        case "$*" in
            "python install 3.10") : >installed ;;
            "python find 3.10") [ -e installed ] && echo {machine.folder}/managed/python ;;
        esac""",
    )
    _, output = machine.setup()
    assert "setup: Python 3.10: /opt/managed" in output


def test_missing_venv_module_is_named(machine: Machine) -> None:
    machine.give_python("bin/python3.10", "3.10\\n/usr/bin/python3.10\\nensurepip\\n")
    status, output = machine.setup()
    assert status == 1
    assert "/usr/bin/python3.10 would do but lacks the module ensurepip: " in output


def test_named_interpreter_is_not_replaced_by_another(machine: Machine) -> None:
    machine.give_python("bin/python3.10", "3.10\\n/opt/real\\n")
    machine.give_python("other", "3.11\\n/opt/other\\n")
    status, output = machine.setup(POLYFORMER_PYTHON=str(machine.folder / "other"))
    assert status == 1
    assert "other will not do" in output


# --- What else a machine may lack -------------------------------------------------------------------------------------


@pytest.mark.parametrize("glibc", ["glibc 2.31", "glibc 2.34", ""])
def test_old_or_other_libc_is_one_sentence(machine: Machine, glibc: str) -> None:
    machine.give("bin/getconf", f"echo {glibc}" if glibc else "exit 1")
    status, output = machine.setup()
    assert status == 1
    assert f"this machine has {glibc or 'glibc none'}" in output
    assert output.count("\n") == 1


def test_other_processor_is_one_sentence(machine: Machine) -> None:
    machine.give("bin/uname", '[ "$1" = -s ] && echo Linux || echo aarch64')
    status, output = machine.setup()
    assert (status, output.count("\n")) == (1, 1)
    assert "this is Linux on aarch64" in output


def test_short_disk_is_one_sentence(machine: Machine) -> None:
    machine.give_python("bin/python3.10", "3.10\\n/opt/real\\n")
    status, output = machine.setup(POLYFORMER_MIN_DISK_GB="1000000")
    assert (status, output.count("\n")) == (1, 1)
    assert "GB free and the set-up needs 1000000 GB" in output


def test_folder_that_is_no_environment_is_left_alone(machine: Machine) -> None:
    machine.give_python("bin/python3.10", "3.10\\n/opt/real\\n")
    precious = machine.repository / ".venv/thesis.tex"
    precious.parent.mkdir()
    precious.touch()
    status, output = machine.setup(POLYFORMER_MIN_DISK_GB="0")
    assert status == 1
    assert "is not a virtual environment" in output
    assert precious.exists()


# --- Half a .venv -----------------------------------------------------------------------------------------------------


@pytest.fixture
def real_python(machine: Machine) -> Machine:
    """A machine on which the interpreter of these tests is python3.10, whatever its version is."""
    base = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    machine.give("bin/python3.10", f"""[ "$2" = -c ] && printf '3.10\\n{base}\\n' || exec {base} "$@" """)
    return machine


def test_failed_installation_is_not_mistaken_for_a_finished_one(real_python: Machine) -> None:
    for expected in ("setup: Python 3.10", "setup: removing a .venv that is unfinished"):
        status, output = real_python.setup(POLYFORMER_MIN_DISK_GB="0")
        assert status == 1
        assert expected in output
        assert "pip failed" in output
        assert not real_python.complete.exists()


def fake_environment(machine: Machine) -> None:
    """A .venv whose pip and imports succeed at once."""
    machine.give(
        "bin/maker",
        'mkdir -p "$4/bin" && : >"$4/pyvenv.cfg" && cat ../python >"$4/bin/python" && chmod +x "$4/bin/python"',
    )
    machine.give("python", '[ "$1" = -VV ] && echo Python 3.10.99; exit 0')
    machine.give_python("bin/python3.10", f"3.10\\n{machine.folder}/bin/maker\\n")


def test_second_run_does_nothing(machine: Machine) -> None:
    fake_environment(machine)
    status, output = machine.setup(POLYFORMER_MIN_DISK_GB="0")
    assert (status, machine.complete.exists()) == (0, True), output
    assert machine.setup() == (0, "")


def test_changed_pyproject_is_installed_into_the_same_environment(machine: Machine) -> None:
    fake_environment(machine)
    machine.setup(POLYFORMER_MIN_DISK_GB="0")
    kept = machine.repository / ".venv/kept"
    kept.touch()
    with (machine.repository / "pyproject.toml").open("a") as pyproject:
        pyproject.write("# changed\n")
    status, output = machine.setup()
    assert status == 0
    assert "setup: pyproject.toml changed" in output
    assert kept.exists()
    assert machine.setup() == (0, "")


@pytest.mark.parametrize("loss", ["interpreter", "stamp", "version", "place"])
def test_environment_that_no_longer_fits_is_made_anew(machine: Machine, loss: str) -> None:
    fake_environment(machine)
    machine.setup(POLYFORMER_MIN_DISK_GB="0")
    (machine.repository / ".venv/kept").touch()
    match loss:
        case "interpreter":
            (machine.repository / ".venv/bin/python").unlink()
        case "stamp":
            machine.complete.unlink()
        case "version":
            machine.give("repository/.venv/bin/python", "echo Python 3.10.98")
        case "place":
            machine.complete.write_text(machine.complete.read_text().replace(str(machine.repository), "/elsewhere"))
    status, output = machine.setup(POLYFORMER_MIN_DISK_GB="0")
    assert status == 0
    assert "setup: removing a .venv that is unfinished or was made elsewhere" in output
    assert not (machine.repository / ".venv/kept").exists()
    assert machine.setup() == (0, "")


def test_killed_set_up_is_started_over(machine: Machine) -> None:
    fake_environment(machine)
    machine.give(
        "python", f'case "$*" in *pip*) : >{machine.folder}/installing; {shutil.which("sleep")} 60 ;; esac; echo Python'
    )
    process = machine.start(POLYFORMER_MIN_DISK_GB="0")
    while not (machine.folder / "installing").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not machine.complete.exists()

    fake_environment(machine)
    status, output = machine.setup(POLYFORMER_MIN_DISK_GB="0")
    assert status == 0
    assert "setup: removing a .venv that is unfinished" in output


def test_failed_import_is_one_sentence_and_leaves_no_stamp(machine: Machine) -> None:
    fake_environment(machine)
    machine.give(
        "python", 'case "$*" in *"import openfhe"*) echo "ImportError: libgomp.so.1" >&2; exit 1 ;; esac; echo Python'
    )
    status, output = machine.setup(POLYFORMER_MIN_DISK_GB="0")
    assert status == 1
    assert "setup: installed, but it does not load: ImportError: libgomp.so.1" in output
    assert not machine.complete.exists()
