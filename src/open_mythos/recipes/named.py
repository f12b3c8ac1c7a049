"""The recipes that come with the package, by name.

Main entries: `recipe_names`, `named_recipe`.
"""

from __future__ import annotations

from importlib.resources import as_file, files

from open_mythos.recipes.folder import read_run
from open_mythos.recipes.run_config import RunConfig


def recipe_names() -> dict[str, str]:
    """Every recipe's name and what it says of itself: its file's first line."""
    found = {}
    for file in files("open_mythos.recipes").iterdir():
        if file.name.endswith(".yaml"):
            found[file.name.removesuffix(".yaml")] = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return dict(sorted(found.items()))


def named_recipe(name: str) -> RunConfig:
    """A recipe by its name."""
    names = recipe_names()
    if name not in names:
        raise ValueError(f"WHAT is {name!r}; it must be a recipe: {', '.join(names)}")
    with as_file(files("open_mythos.recipes") / f"{name}.yaml") as path:
        return read_run(path)
