"""Imports flow one way, every module stands alone, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import open_mythos

ROOT = Path(open_mythos.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Parts of one row do not import each other; a part may import what lies in rows before its own.
ROWS = [
    ("config", "presets"),
    ("data",),
    ("model",),
    ("inference", "training", "analysis"),
    ("hf", "serving", "bench", "recipes"),
    ("tour",),
    ("cli",),
]
ROW_OF = {part: row for row, parts in enumerate(ROWS) for part in parts}
# Parts of one row that are one idea in two files.
TOGETHER = {("presets", "config")}
# The front doors: they name things from everywhere, and nothing inside imports them.
DOORS = {"__init__", "__main__", "main"}


def _part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that the file imports, inside functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the direction"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def _own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of the package for each import of our own."""
    for line, name in _imported(path):
        head, *rest = name.split(".")
        if head == "open_mythos":
            yield line, rest[0] if rest else "__init__"


def test_every_part_of_the_package_has_a_row() -> None:
    unknown = {_part(path) for path in FILES} - ROW_OF.keys() - DOORS
    assert not unknown, f"{sorted(unknown)} must be given a row in ROWS: who may import it?"


@pytest.mark.parametrize("part", ROW_OF)
def test_imports_flow_one_way(part: str) -> None:
    wrong = []
    for path in FILES:
        if _part(path) != part:
            continue
        for line, other in _own_imports(path):
            allowed = (
                other in (part, "__version__")
                or ROW_OF.get(other, len(ROWS)) < ROW_OF[part]
                or (part, other) in TOGETHER
            )
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_main_only_re_exports() -> None:
    tree = ast.parse((ROOT / "main.py").read_text(encoding="utf-8"))
    assert all(isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign) for node in tree.body)


@pytest.mark.parametrize("name", ["config", "presets"])
def test_describing_a_model_does_not_import_torch(name: str) -> None:
    assert not any(imported.split(".")[0] == "torch" for _, imported in _imported(ROOT / f"{name}.py"))


def test_modules_outside_hf_import_transformers_nowhere() -> None:
    """Optional packages are imported only where they serve."""
    users = {_part(path) for path in FILES for _, name in _imported(path) if name.split(".")[0] == "transformers"}
    assert users <= {"hf", "cli", "bench"}


def _run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


ALONE = """
import importlib, sys, traceback
import numpy, torch
failed = []
for name in {names!r}:
    for loaded in [key for key in sys.modules if key.split(".")[0] == "open_mythos"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except Exception:
        failed.append(name + "\\n" + traceback.format_exc())
print("\\n".join(failed))
"""


def test_every_module_imports_alone() -> None:
    """Each first in a package that nothing else has touched: an import cycle shows only to whoever comes first."""
    names = [_module(path) for path in FILES if path.name != "__main__.py"]
    assert _run(ALONE.format(names=names)).strip() == ""


def test_every_file_compiles() -> None:
    for path in FILES:
        compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_importing_the_package_loads_nothing_heavy() -> None:
    """`import open_mythos` costs at most 1.2 times `import torch`; not importing torch at all is the surest way."""
    loaded = _run("import sys, open_mythos; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert not {"torch", "numpy", "safetensors", "transformers", "matplotlib", "rich", "tyro"} & set(loaded)


def test_building_a_model_loads_nothing_beyond_torch_and_safetensors() -> None:
    loaded = _run(
        "import sys; from open_mythos import OpenMythos; print(*{n.split('.')[0] for n in sys.modules})"
    ).split()
    assert "torch" in loaded
    assert not {"transformers", "matplotlib", "rich", "tyro", "numba"} & set(loaded)


@pytest.mark.parametrize("name", open_mythos.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(open_mythos, name) is not None
    assert name in dir(open_mythos)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Mythos'"):
        _ = open_mythos.Mythos


def test_the_two_import_paths_give_the_same_classes() -> None:
    from open_mythos import main

    assert main.OpenMythos is open_mythos.OpenMythos
    assert main.MythosConfig is open_mythos.MythosConfig
