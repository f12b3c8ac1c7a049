"""Recurrent-depth transformers: depth is chosen at inference.

Public names are loaded on first use, so that `import open_mythos` costs nothing by itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_mythos.config import MythosConfig
    from open_mythos.model.mythos import MythosOutput, OpenMythos

__version__ = "1.0.0"

_HOMES = {
    "MythosConfig": "open_mythos.config",
    "MythosOutput": "open_mythos.model.mythos",
    "OpenMythos": "open_mythos.model.mythos",
}
__all__ = ["MythosConfig", "MythosOutput", "OpenMythos", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
