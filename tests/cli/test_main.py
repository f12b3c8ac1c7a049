"""The command line finds its verbs, starts quickly, and answers bad input in one line."""

import subprocess
import sys

import pytest

from open_mythos import __version__
from open_mythos.cli.main import VERBS, main


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_every_verb_with_an_example(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    text = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert verb.summary in text
        assert verb.example in text
        assert verb.example.startswith(f"mythos {name} ")


def test_no_verb_prints_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: mythos VERB" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    assert capsys.readouterr().out == f"mythos {__version__}\n"


def test_bad_input_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["inspct"], ["inspect", "mythos_2b"], ["inspect", "mythos_tiny", "--loops", "0"]):
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("mythos: ")
        assert captured.err.count("\n") == 1


def test_a_mistyped_verb_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspct"])
    assert "did you mean inspect?" in capsys.readouterr().err


def test_the_module_equals_the_command_and_help_loads_nothing_heavy() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['mythos', '--help']\n"
        "try:\n    runpy.run_module('open_mythos', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'tyro', 'rich', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: mythos VERB" in done.stdout
