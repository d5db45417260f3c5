"""What the README shows works.

Every `bash` and `python` block of README.md carries a mark on the line above it, invisible when rendered:

    <!-- test -->                   the block runs here
    <!-- no test: the reason -->    it does not, and the reason is on the page

The marked blocks run from top to bottom in one temporary folder, as a reader would follow them. A line `make something`
is not run but must name a target of the Makefile, in every block.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
MAKE = re.compile(r"^(?:\$ )?make +(?P<target>[a-z-]+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a Markdown text."""

    language: str
    code: str
    line: int  # of the opening fence, counted from 1
    mark: str | None

    def __str__(self) -> str:
        return f"line-{self.line}-{self.language}"

    @property
    def runs(self) -> bool:
        return self.mark == "test"

    @property
    def make_targets(self) -> list[str]:
        return MAKE.findall(self.code)

    @property
    def command(self) -> list[str]:
        """The block as a program, without its `make` lines."""
        if self.language == "python":
            return [sys.executable, "-c", self.code]
        lines = [line for line in self.code.splitlines() if not MAKE.match(line)]
        return ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]


def blocks(markdown: str) -> list[Block]:
    """The `bash` and `python` blocks of a Markdown text, in order."""
    return [
        Block(
            language=found["language"],
            code=found["code"],
            line=markdown.count("\n", 0, found.start("language")) + 1,
            mark=found["mark"],
        )
        for found in BLOCK.finditer(markdown)
    ]


README = blocks((ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the reader of the README works."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("block", README, ids=str)
def test_block_is_marked(block: Block) -> None:
    marked = block.runs or (block.mark or "").startswith("no test: ")
    assert marked, f"README.md:{block.line}: put `<!-- test -->` or `<!-- no test: the reason -->` above this block"


@pytest.mark.parametrize("block", [block for block in README if block.runs], ids=str)
def test_block_runs(block: Block, folder: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        block.command,
        cwd=folder,
        env=os.environ | {"PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"README.md:{block.line} ends with status {done.returncode}:\n{done.stdout}"


@pytest.mark.parametrize("target", sorted({target for block in README for target in block.make_targets}))
def test_make_target_exists(target: str) -> None:
    # The variables of an outer `make test` would turn a dry run into something else.
    env = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- The test of the test ---------------------------------------------------------------------------------------------

EXAMPLE = """\
# Title

<!-- test -->
```bash
make demo ARGS="--quick"
echo one
```

```python
print("two")
```

<!-- no test: needs a second machine -->
```bash
polyformer serve
```

```text
make nothing
```
"""


def test_blocks_are_found() -> None:
    first, second, third = blocks(EXAMPLE)
    assert (first.line, first.runs, first.make_targets) == (4, True, ["demo"])
    assert first.command == ["bash", "-euo", "pipefail", "-c", "echo one"]
    assert (second.line, second.runs, second.mark) == (9, False, None)
    assert (third.line, third.runs, third.mark) == (14, False, "no test: needs a second machine")
