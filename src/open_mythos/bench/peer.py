"""open-mythos 0.5.0, the package that our speed is compared with.

Main entry: `load_peer`. It is installed without its dependencies into a folder of its own and loaded under another
name; nothing but the benchmark ever sees it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

PEER = "open-mythos==0.5.0"


class PeerUnavailableError(RuntimeError):
    """The peer could not be installed, for example because there is no network."""


def load_peer(directory: Path) -> ModuleType:
    """The peer's `main` module, fetched into `directory` unless it is there already.

    Raises `PeerUnavailableError` with the installer's last line if it cannot be had.
    """
    source = directory / "open_mythos" / "main.py"
    if not source.is_file():
        _install(directory)
    spec = importlib.util.spec_from_file_location("open_mythos_peer", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


def _has_pip() -> bool:
    """Asked of its files: asking the import system makes setuptools, and so `torch.compile`, fail on Python 3.11."""
    try:
        importlib.metadata.distribution("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _install(directory: Path) -> None:
    if _has_pip():
        installer = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    elif shutil.which("uv"):
        installer = ["uv", "pip", "install", "--quiet"]
    else:
        raise PeerUnavailableError(f"neither pip nor uv is there to install {PEER}")
    command = [*installer, "--no-deps", "--target", str(directory), PEER]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise PeerUnavailableError(f"installing {PEER} failed: {lines[-1]}")
