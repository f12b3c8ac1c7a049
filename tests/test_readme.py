"""Every Python block of the README and the docs runs as it stands; every command in them is one that exists."""

import re
import shlex
from pathlib import Path

import pytest

from open_mythos.cli.main import VERBS, main, parse
from open_mythos.presets import PRESETS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKE_TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def _blocks(language: str) -> list[pytest.param]:
    blocks = []
    for page in PAGES:
        found = re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        blocks += [pytest.param(block, id=f"{page.stem}-{number}") for number, block in enumerate(found)]
    return blocks


def _commands(program: str) -> list[str]:
    lines = [line.split("#")[0].strip() for block in _blocks("sh") for line in block.values[0].splitlines()]
    return sorted({line for line in lines if line.split(" ")[0] == program})


@pytest.mark.parametrize("block", _blocks("python"))
def test_python_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README", "exec"), {})


@pytest.mark.parametrize("command", _commands("make"))
def test_make_target_exists(command: str) -> None:
    assert set(command.split()[1:]) <= MAKE_TARGETS


@pytest.mark.parametrize("command", _commands("mythos"))
def test_mythos_command_is_understood(command: str) -> None:
    """The words parse; what the verbs then do is tested in tests/cli."""
    name, *words = shlex.split(command)[1:]
    assert name in VERBS
    assert parse(name, words)


@pytest.mark.parametrize(
    "command", [c for c in _commands("mythos") if c.split()[1] == "inspect" and c.split()[2] in PRESETS]
)
def test_inspect_command_runs(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(command)[1:]) == 0
    assert "parameters" in capsys.readouterr().out.lower()


def test_readme_shows_the_two_commands() -> None:
    assert {"make demo", "make test"} <= set(_commands("make"))
