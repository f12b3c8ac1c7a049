"""`mythos generate`: what is printed, what is coloured, what goes into files, and what is refused in one line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.color import Color

from open_mythos import OpenMythos
from open_mythos.cli import generate_display
from open_mythos.cli.generate_display import Display, depth_style
from open_mythos.cli.main import main, parse
from open_mythos.data.tokenizer import TextTokenizer
from open_mythos.data.tokenizer_spec import char_tokenizer
from open_mythos.inference import Engine, Event, PredictionChange, SamplingParams, StableArgmax, StateChange, Stats
from tiny import tiny_config, tiny_model

PROMPT = "abcab"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16 characters and the end of text whose positions halt at different loops."""
    path = tmp_path_factory.mktemp("model")
    tiny_model(tiny_config(max_seq_len=32)).save_pretrained(path)
    char_tokenizer(["abcdefghijklmno\n"]).save(path)
    return path


@pytest.fixture(autouse=True)
def _plain_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def _text(folder: Path, *words: str) -> list[str]:
    return ["generate", str(folder), "--prompt", PROMPT, "--max-new-tokens", "12", "--temperature", "1.5", *words]


def _alone(folder: Path, **wishes):
    """What the engine gives for the same."""
    model, tokenizer = OpenMythos.from_pretrained(folder), TextTokenizer.load(folder)
    wishes = {"max_new_tokens": 12, "temperature": 1.5, "stop_tokens": (tokenizer.end_of_text,), **wishes}
    return Engine(model, tokenizer=tokenizer).generate([tokenizer.encode(PROMPT)], SamplingParams(**wishes))[0]


@pytest.mark.parametrize(
    ("words", "wishes"),
    [
        ([], {}),
        (["--loops", "2"], {"n_loops": 2}),
        (["--loops", "9", "--exit", "state:0.3"], {"n_loops": 9, "exit_rule": StateChange(0.3)}),
        (["--exit", "prediction:0.02"], {"exit_rule": PredictionChange(0.02)}),
        (["--exit", "argmax:2"], {"exit_rule": StableArgmax(2)}),
        (["--temperature", "0"], {"temperature": 0.0}),
        (["--top-k", "2", "--seed", "7"], {"top_k": 2, "seed": 7}),
        (["--top-p", "0.5", "--repetition-penalty", "1.4"], {"top_p": 0.5, "repetition_penalty": 1.4}),
        (["--min-p", "0.2"], {"min_p": 0.2}),
    ],
)
def test_a_pipe_gets_the_text_and_nothing_else(
    folder: Path, words: list[str], wishes: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_text(folder, *words)) == 0
    printed = capsys.readouterr()
    assert printed.out == PROMPT + _alone(folder, **wishes).text + "\n"
    assert printed.err == ""


def test_a_text_ends_before_the_first_stop_string(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = _alone(folder).text
    first, second = text[5:8], text[3:5]
    assert main(_text(folder, "--stop", first, "--stop", second)) == 0
    assert capsys.readouterr().out == PROMPT + _alone(folder, stop_strings=(first, second)).text + "\n"
    assert parse("generate", [str(folder), "--stop", "a", "--stop", "\n"]).stop == ("a", "\n")


def test_the_end_of_text_ends_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed, ended = next((seed, one) for seed in range(60) if (one := _alone(folder, seed=seed)).finish_reason == "stop")
    assert len(ended.token_ids) < 12
    assert main(_text(folder, "--seed", str(seed))) == 0
    assert capsys.readouterr().out == PROMPT + ended.text + "\n"


def test_showing_exits_leaves_the_text_of_a_pipe_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_text(folder)) == 0
    text = capsys.readouterr().out
    assert main(_text(folder, "--show-exits")) == 0
    printed = capsys.readouterr()
    assert printed.out == text
    assert "loops per token  ■ 1  ■ 2  ■ 3  ■ 4" in printed.err
    exits = _alone(folder).exit_loops
    assert f"mean {sum(exits) / len(exits):.2f} of at most 4 loops" in printed.err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_every_token_in_the_colour_of_its_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that were held back because a stop string might have begun; and says how fast and how deep."""
    screen, notes = _Terminal(), _Terminal()
    for name, value in (("TERM", "xterm"), ("COLORTERM", "truecolor"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stderr", notes)
    display = Display(char_tokenizer(["abc"]), 16, show_exits=True)
    display.begin("ab")
    for token, loops, text in ((0, 1, "a"), (1, 4, ""), (2, 16, "bc"), (3, 2, "")):
        display.show(Event(0, token, loops, None, text))
    display.end(Stats(tokens=4, seconds=2.0))
    shown = screen.getvalue()
    for text, loops in (("a", 1), ("b", 4), ("c", 16)):
        red, green, blue = depth_style(loops, 16).color.triplet
        assert f"\x1b[38;2;{red};{green};{blue}m{text}\x1b[0m" in shown
    assert shown.startswith("\x1b[1mab\x1b[0m")
    said = notes.getvalue()
    assert "4 tokens in 2.0 s, 2.0 tokens/s, 5.75 loops per token" in said
    assert "mean 5.75 of at most 16 loops" in said
    for share in (" 1: 25%", " 2: 25%", " 4: 25%", " 16: 25%"):
        assert share in said


def test_the_colours_go_from_the_first_to_the_last_whatever_the_depth() -> None:
    scale = [Color.from_rgb(*one) for one in generate_display._SCALE]
    for n_loops in (2, 3, 16, 1000):
        assert depth_style(1, n_loops).color == scale[0]
        assert depth_style(n_loops, n_loops).color == scale[-1]
    assert depth_style(1, 1).color == scale[0]
    assert len({depth_style(loops, 16).color for loops in range(1, 17)}) == 16


@pytest.mark.parametrize("n_loops", [1, 2, 7, 8, 9, 20, 64, 1000])
def test_a_legend_has_every_depth_once(n_loops: int) -> None:
    ranges = generate_display._ranges(n_loops)
    assert [loops for low, high in ranges for loops in range(low, high + 1)] == list(range(1, n_loops + 1))
    assert len(ranges) <= max(8, 2 * n_loops.bit_length())


def test_many_prompts_give_rows_in_their_order(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal rows from lines, from JSON lines and into a file; the first is what the prompt gives alone."""
    prompts = [PROMPT, "k", PROMPT, "a b"[:1]]
    (tmp_path / "p.txt").write_text("\n".join([PROMPT, "", "k\r", PROMPT, "a"]) + "\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    words = ["generate", str(folder), "--max-new-tokens", "12", "--temperature", "1.5"]
    printed = []
    for name in ("p.txt", "p.jsonl"):
        assert main([*words, "--prompts", str(tmp_path / name)]) == 0
        printed.append(capsys.readouterr().out)
    out = tmp_path / "new" / "rows.jsonl"
    assert main([*words, "--prompts", str(tmp_path / "p.txt"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert printed[0] == printed[1] == out.read_text()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    expected = _alone(folder)
    assert rows[0] == {
        "prompt": PROMPT,
        "text": expected.text,
        "tokens": len(expected.token_ids),
        "exit_loops": expected.exit_loops,
        "finish_reason": expected.finish_reason,
        "error": None,
    }
    assert rows[2]["text"] == _alone(folder, seed=2).text != rows[0]["text"]
    assert all(row["tokens"] == len(row["exit_loops"]) for row in rows)


def test_a_prompt_that_cannot_be_served_fails_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text(f"XYZ\n{PROMPT}\n{'a' * 40}\n")
    words = ["generate", str(folder), "--prompts", str(tmp_path / "p.txt"), "--max-new-tokens", "3", "--temperature"]
    assert main([*words, "1.5", "--seed", "4"]) == 2
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["finish_reason"] for row in rows] == ["error", "length", "error"]
    assert "'X'" in rows[0]["error"]
    assert rows[1]["text"] == _alone(folder, max_new_tokens=3, seed=5).text
    assert "prompt has 40 tokens; it must have 1 to max_seq_len - 1 (31)" in rows[2]["error"]
    assert printed.err == "mythos: 2 of 3 prompts failed; their rows say why\n"


def test_where_every_prompt_fails_every_row_says_why(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("X\nY\n")
    assert main(["generate", str(folder), "--prompts", str(tmp_path / "p.txt")]) == 2
    printed = capsys.readouterr()
    assert [json.loads(line)["finish_reason"] for line in printed.out.splitlines()] == ["error", "error"]
    assert "2 of 2 prompts failed" in printed.err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", b"\n \n", "has no prompt"),
        ("p.txt", b"caf\xe9", "not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n\nb\n', "p.jsonl, line 3, is not JSON"),
        ("p.jsonl", b'{"prompt": "a", "seed": 1}\n', 'must be {"prompt": TEXT} and nothing else'),
        ("p.jsonl", b'["a"]\n', 'must be {"prompt": TEXT}'),
        ("p.jsonl", b'{"prompt": 3}\n', 'must be {"prompt": TEXT}'),
    ],
)
def test_files_of_prompts_that_are_none_are_refused(
    folder: Path, tmp_path: Path, name: str, content: bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["generate", str(folder), "--prompts", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--exit", "state"], "exit is 'state'; it must be state:TOLERANCE"),
        (["--exit", "state:-1"], "exit is 'state:-1'"),
        (["--exit", "argmax:1.5"], "exit is 'argmax:1.5'"),
        (["--exit", "depth:3"], "exit is 'depth:3'"),
        (["--loops", "two"], "loops is 'two'"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--stop", ""], "stop is ''"),
        (["--out", "x.jsonl"], "out is for the texts of --prompts"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompts", "p.txt", "--prompt", "a"], "cannot be given together with --prompt"),
        (["--prompts", "p.txt", "--show-exits"], "cannot be given together with --show-exits"),
        (["--prompt", "XYZ"], "the text has 'X'"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_printed(
    folder: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), *words]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.startswith("mythos: ")
    assert printed.out == ""


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("--exit state:0.05 --show-exits", "max_loop_iters", "goes on from the second half", "--stop"):
        assert words in shown
