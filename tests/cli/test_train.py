"""`mythos train`, `sweep`, `generate` and `export`, as a user types them, on runs of seconds."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.analysis.depth_law import fit_depth_law
from open_mythos.cli.main import main, parse
from open_mythos.recipes.material import open_material
from open_mythos.training.depth import Uniform
from open_mythos.training.records import read_metrics

SMALL_TASK = [
    *("--steps", "4", "--batch-size", "4", "--model.dim", "16", "--model.expert-dim", "8", "--checkpoint-every", "2"),
    *("--sweep-problems", "2", "--sweep-loops", "1", "4", "--sweep-lengths", "8", "16"),
]
SMALL_ADDITION = [
    *("--steps", "1", "--batch-size", "2", "--model.dim", "16"),
    *("--sweep-problems", "2", "--sweep-loops", "1", "--sweep-lengths", "12"),
]
SMALL_TEXT = [
    *("--steps", "4", "--batch-size", "2", "--seq-len", "16", "--checkpoint-every", "2", "--sweep-rows", "2"),
    *("--model.dim", "16", "--model.max-seq-len", "64", "--model.n-heads", "2", "--model.n-kv-heads", "1"),
    *("--model.ffn-dim", "24", "--depth", "{name: poisson, mean: 2, grad_loops: 1}"),
]


@pytest.fixture(autouse=True)
def _plain_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a few kilobytes of text."""
    folder = tmp_path_factory.mktemp("text")
    book = folder / "book.txt"
    book.write_text("It was the best of times, it was the worst of times.\n" * 60, encoding="utf-8")
    assert main(["train", "text", "--data", str(book), "--out", str(folder / "run"), *SMALL_TEXT]) == 0
    return folder


def test_a_task_is_trained_and_swept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["train", "parity", "--out", str(out), *SMALL_TASK]) == 0
    printed = capsys.readouterr().out
    assert "busiest expert" in printed
    assert "mythos sweep" in printed
    assert [line["step"] for line in read_metrics(out) if "loss" in line] == [0, 1, 2, 3]
    assert [line["step"] for line in read_metrics(out) if "sweep" in line] == [4]
    assert list((out / "tensorboard").iterdir())
    model = OpenMythos.from_pretrained(out)
    assert model.config.vocab_size == 3
    rows_file = tmp_path / "rows" / "sweep.json"
    picture = tmp_path / "sweep.png"
    words = ["sweep", str(out), "--loops", "1,2,8", "--lengths", "24,48", "--json", str(rows_file)]
    assert main([*words, "--plot", str(picture)]) == 0
    rows = json.loads(rows_file.read_text())
    assert [(row["length"], row["n_loops"]) for row in rows] == [(n, t) for n in (24, 48) for t in (1, 2, 8)]
    assert all(set(row) == {"length", "n_loops", "loss", "accuracy", "exact_match"} for row in rows)
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["export", str(out), "--out", str(tmp_path / "exported")]) == 0
    exported = OpenMythos.from_pretrained(tmp_path / "exported")
    for name, tensor in model.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name


def test_a_run_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", "parity", "--out", str(whole), *SMALL_TASK]) == 0
    assert main(["train", "parity", "--out", str(parts), *SMALL_TASK]) == 0
    shutil.rmtree(parts / "checkpoints" / "step-000004")
    capsys.readouterr()
    assert main(["train", "parity", "--out", str(parts), *SMALL_TASK]) == 0
    assert "Resuming after step 2." in capsys.readouterr().out
    losses = [[line["loss"] for line in read_metrics(out) if "loss" in line] for out in (whole, parts)]
    assert losses[0] == losses[1]


def test_text_is_trained_measured_and_generated(text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = text_run / "run"
    lines = read_metrics(run)
    assert all(line["bits_per_byte"] > 0 for line in lines if "loss" in line)
    assert (run / "tokenizer.json").is_file()
    assert main(["sweep", str(run), "--loops", "1,3"]) == 0
    assert "accuracy" in capsys.readouterr().out
    words = ["generate", str(run), "--prompt", "It was", "--max-new-tokens", "12"]
    assert main([*words, "--loops", "2", "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert main([*words, "--loops", "2", "--seed", "1"]) == 0
    assert capsys.readouterr().out == first
    assert first.startswith("It was")
    assert main([*words, "--loops", "auto"]) == 0


def test_a_data_file_that_has_vanished_does_not_stop_a_run(text_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    book = tmp_path / "book.txt"
    book.write_text((text_run / "book.txt").read_text())
    words = ["train", "text", "--data", str(book), "--out", str(folder), *SMALL_TEXT]
    assert main(words) == 0
    book.unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    assert main(words) == 0
    assert main(["sweep", str(folder), "--loops", "1"]) == 0


def test_a_run_keeps_its_own_copy_of_the_text(tmp_path: Path) -> None:
    """Text that changes between two parts of a run, as chars, whose vocabulary would change with it."""
    book = tmp_path / "book.txt"
    book.write_text("It was the best of times. " * 90)
    words = ["train", "text", "--tokenizer", "chars", "--data", str(book), *SMALL_TEXT, "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*words, str(whole)]) == 0
    assert main([*words, str(parts)]) == 0
    shutil.rmtree(parts / "checkpoints" / "step-000004")
    book.write_text("XYZ, 0123456789: something else. " * 200)
    assert main([*words, str(parts)]) == 0
    losses = [[line["loss"] for line in read_metrics(out) if "loss" in line] for out in (whole, parts)]
    assert losses[0] == losses[1]
    assert main(["sweep", str(parts), "--loops", "1", "--lengths", "8,16"]) == 0
    assert main(["export", str(parts), "--out", str(tmp_path / "exported")]) == 0


def test_a_run_that_is_not_finished_can_be_swept(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []

    def open_once(run: object, *rest: object, **more: object) -> object:
        opened.append(run)
        return open_material(run, *rest, **more)

    monkeypatch.setattr("open_mythos.recipes.train.open_material", open_once)
    monkeypatch.setattr("open_mythos.cli.sweep.open_material", open_once)
    shutil.copytree(text_run / "run", tmp_path / "run")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "run" / name).unlink()
    assert main(["sweep", str(tmp_path / "run"), "--loops", "1"]) == 0
    assert "not finished: this is its checkpoint of step 4" in capsys.readouterr().out
    assert len(opened) == 1, "text may be tokenised when it is opened"


def test_a_run_cannot_be_made_shorter_than_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert main(["train", "parity", "--out", out, *SMALL_TASK]) == 0
    assert main(["train", "parity", "--out", out, *SMALL_TASK, "--steps", "3"]) == 2
    assert "steps is 3; it must be at least" in capsys.readouterr().err


def test_a_folder_can_be_used_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("book.txt").write_text("A relative path means a file here. " * 60)
    assert main(["train", "text", "--data", "book.txt", "--out", "run", *SMALL_TEXT]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "here/run", "--loops", "1"]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train"], "WHAT is missing"),
        (["train", "poetry", "--out", "x"], "WHAT is 'poetry'"),
        (["train", "text", "--out", "x", "--data", "nowhere.txt"], "nowhere.txt"),
        (["train", "text", "--out", "x", "--seq-len", "4096"], "seq_len is 4096"),
        (["train", "parity", "--out", "x", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "parity", "--out", "x", "--device", "cuda"], "there is no GPU"),
        (["train", "parity", "--out", "x", "--device", "tpu"], "device is 'tpu'"),
        (["train", "parity", "--out", "x", "--sweep-loops", "0"], "sweep_loops is [0]"),
        (["train", "parity", "--out", "x", "--sweep-lengths", "0"], "sweep_lengths is [0]"),
        (["train", "parity", "--out", "pyproject.toml"], "out is pyproject.toml, which is a file"),
        (["sweep", "nowhere"], "has no run.yaml"),
        (["generate", "nowhere"], "not a complete model folder"),
        (["export", "nowhere", "--out", "x"], "has no run.yaml"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if says == "there is no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").touch()
    assert main(words) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.startswith("mythos: ")


@pytest.mark.parametrize(("flag", "value"), [("--loops", "0"), ("--loops", "two"), ("--lengths", "9999")])
def test_sweeps_refuse_wrong_numbers(text_run: Path, flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(text_run / "run"), flag, value]) == 2
    assert flag.removeprefix("--") in capsys.readouterr().err


def test_lengths_of_a_sweep_are_measured_in_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Addition takes two tokens per digit and one more: 19 digits fit into 40, 24 do not, whatever 24 is below."""
    out = str(tmp_path / "run")
    assert main(["train", "addition", "--out", out, "--model.max-seq-len", "40", *SMALL_ADDITION]) == 0
    assert main(["sweep", out, "--loops", "1", "--lengths", "19", "--rows", "2"]) == 0
    capsys.readouterr()
    assert main(["sweep", out, "--loops", "1", "--lengths", "19,24"]) == 2
    says = "lengths has 24, which takes 49 positions; they must be at most max_seq_len (40)"
    assert says in capsys.readouterr().err


def test_a_sweep_ends_with_a_law_that_predicts(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows stay rows: the law has a file of its own, and its figures are those of the fit to the rows."""
    run, rows_file, law_file = str(text_run / "run"), tmp_path / "rows.json", tmp_path / "new" / "law.json"
    files = ["--json", str(rows_file), "--law", str(law_file), "--plot", str(tmp_path / "plot.png")]
    assert main(["sweep", run, "--loops", "1,2,3,4,8", "--fit-loops", "4", "--target", "9", *files]) == 0
    printed = capsys.readouterr().out
    assert "length 16: loss saturates at" in printed
    assert "loss 9: 1 loop\n" in printed
    assert "8 loops: predicted" in printed
    rows = json.loads(rows_file.read_text())
    assert all(set(row) == {"length", "n_loops", "loss", "accuracy", "exact_match"} for row in rows)
    (law,) = json.loads(law_file.read_text())
    fitted = fit_depth_law({row["n_loops"]: row["loss"] for row in rows[:4]}, "loss")
    assert law == {"length": 16, **asdict(fitted), "covered": fitted.covered, "target": 9, "target_loops": 1}
    assert main(["sweep", run, "--loops", "1,2"]) == 0
    assert "saturates" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--loops", "1,2,1", "--target", "1"], "loops has 2 depths; for a law it must have at least 3"),
        (["--loops", "1,2,8", "--fit-loops", "4"], "loops has 2 depths up to fit_loops (4); for a law"),
        (["--loops", "1,2,8", "--target", "-1"], "target is -1.0; it must be a loss, at least 0"),
        (["--loops", "1,2,8", "--target", "inf"], "target is inf; it must be a loss"),
    ],
)
def test_laws_that_cannot_be_are_refused_before_anything_is_measured(
    words: list[str], says: str, text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(text_run / "run"), *words]) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert not told.out


def test_text_may_be_longer_than_the_context(text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(text_run / "run"), "--prompt", "It was", "--max-new-tokens", "150", "--loops", "1"]
    assert main([*words, "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out) > 64  # an untrained model may end the text, or give bytes that are no text
    assert main([*words[:4], "--max-new-tokens", "0"]) == 2
    assert "max_new_tokens is 0" in capsys.readouterr().err


@pytest.mark.parametrize(("prompt", "says"), [("", "prompt has 0 tokens"), ("x" * 80, "prompt has 80 tokens")])
def test_generation_refuses_prompts_that_do_not_fit(
    text_run: Path, prompt: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(text_run / "run"), "--prompt", prompt]) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert not told.out


def test_generation_refuses_wrong_loops(text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(text_run / "run"), "--loops", "0"]) == 2
    assert "loops is '0'" in capsys.readouterr().err


def test_bad_text_is_named_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content, says in (("empty.txt", b"", "empty"), ("latin.txt", b"caf\xe9 " * 50, "UTF-8")):
        (tmp_path / name).write_bytes(content)
        assert main(["train", "text", "--data", str(tmp_path / name), "--out", str(tmp_path / "run"), *SMALL_TEXT]) == 2
        told = capsys.readouterr().err
        assert says in told
        assert name in told
    (tmp_path / "good.txt").write_text("All is well that ends well. " * 60)
    good = ["train", "text", "--data", str(tmp_path / "good.txt"), "--out", str(tmp_path / "run"), *SMALL_TEXT]
    assert main(good) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert main(["train", "parity", "--out", str(tmp_path / "closed" / "run"), *SMALL_TASK]) == 2
    assert "closed" in capsys.readouterr().err


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text("training: {steps: 7, seed: 3}\nmodel: {dim: 32}\n")
    words = ["parity", "--out", "x", "--config", str(config), "--seed", "5", "--depth", "{name: uniform, most: 3}"]
    run = parse("train", words).run
    assert (run.training.steps, run.training.seed, run.model.dim, run.longest) == (7, 5, 32, 16)
    assert run.depth == Uniform(most=3)
    assert run.model.expert_dim == 32


def test_help_lists_the_recipes_and_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "parity" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "text", "--help"])
    shown = capsys.readouterr().out
    for flag in ("--data", "--tokenizer", "--steps", "--checkpoint-every", "--model.dim", "--depth", "--seed"):
        assert flag in shown
