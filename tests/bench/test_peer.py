"""The peer is loaded from a folder of its own, and its absence is told honestly. Nothing here touches the network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from open_mythos.bench.peer import PEER, PeerUnavailableError, load_peer

SOURCE = """
from dataclasses import dataclass

@dataclass
class MythosConfig:
    dim: int = 7
"""


def install(directory: Path) -> None:
    (directory / "open_mythos").mkdir(parents=True)
    (directory / "open_mythos" / "main.py").write_text(SOURCE)


@pytest.fixture(autouse=True)
def _no_leftover_peer() -> Any:
    yield
    sys.modules.pop("open_mythos_peer", None)


def test_an_installed_peer_is_loaded_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it is there already: nothing must be installed")

    monkeypatch.setattr(subprocess, "run", refuse)
    install(tmp_path)
    before = sys.modules["open_mythos"]
    peer = load_peer(tmp_path)
    assert peer.__name__ == "open_mythos_peer"
    assert peer.MythosConfig().dim == 7
    assert sys.modules["open_mythos"] is before
    assert str(tmp_path) not in sys.path


def test_it_is_installed_without_dependencies_into_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fake(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        install(tmp_path / "peer")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake)
    assert load_peer(tmp_path / "peer").MythosConfig().dim == 7
    (command,) = commands
    assert command[-4:] == ["--no-deps", "--target", str(tmp_path / "peer"), PEER]


@pytest.mark.parametrize(
    ("stderr", "told"),
    [("WARNING: retrying\nERROR: no matching distribution\n", "ERROR: no matching distribution"), ("", "no message")],
)
def test_a_failed_installation_is_told_with_the_installers_last_line(
    stderr: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr))
    with pytest.raises(PeerUnavailableError, match=f"^installing {PEER} failed: {told}$"):
        load_peer(tmp_path / "peer")


def test_without_any_installer_it_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_mythos.bench.peer._has_pip", lambda: False)
    monkeypatch.setattr("open_mythos.bench.peer.shutil.which", lambda _: None)
    with pytest.raises(PeerUnavailableError, match=f"neither pip nor uv is there to install {PEER}"):
        load_peer(tmp_path / "peer")


def test_looking_for_pip_leaves_setuptools_importable() -> None:
    """The import system, asked for pip, takes setuptools for a part of pip: `torch.compile` then fails."""
    pytest.importorskip("setuptools")
    code = "from open_mythos.bench.peer import _has_pip; _has_pip(); import setuptools"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
