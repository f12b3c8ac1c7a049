"""A task's recipe with one thing changed at a time: python benchmarks/ablation.py RECIPE [--changes NAME ...]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from from_recipe import altered, cell, most_loops, needed_loops, options, print_headings, print_row, recipe, trained
from open_mythos import OpenMythos
from open_mythos.recipes.run_config import TaskRun

BASES: dict[str, dict[str, Any]] = {
    "parity": {
        "model": {"n_experts": 0, "dropout": 0.0},
        "training": {"steps": 400},
        "sweep_lengths": [24, 96],
        "sweep_loops": [4, 6, 12, 32, 128],
    },
    "addition": {"sweep_loops": [6, 12, 64]},
    "p_hop": {"training": {"steps": 800}, "sweep_loops": [4, 8, 12, 32]},
}
"""What each recipe is before anything is changed, and where it is measured."""


class Change(NamedTuple):
    """What a row changes: fields of the run, then the model that it builds."""

    run: dict[str, Any]
    model: Callable[[OpenMythos], None] | None = None


def no_carry(model: OpenMythos) -> None:
    """A stays at its lower bound."""
    injection = model.recurrent.injection
    nn.init.constant_(injection.log_a.requires_grad_(False), 9.0)
    injection.log_dt.requires_grad_(False)


def no_prelude_norm(model: OpenMythos) -> None:
    """What the prelude writes enters the loops as it is."""
    model.prelude_norm = nn.Identity()  # type: ignore[assignment]


def changes(run: TaskRun) -> dict[str, Change]:
    """Every row by its name."""
    needed, most = needed_loops(run), most_loops(run)
    learned = {"grad_loops": run.depth.grad_loops}
    fields: dict[str, dict[str, Any]] = {
        "the base": {},
        "no attention sink": {"model": {"attention_sink": False}},
        **_windows(run.model.loop_reach),
        "no rotary positions": {"model": {"use_rope": False}},
        "one head": {"model": {"n_heads": 1, "n_kv_heads": 1}},
        "four heads": {"model": {"n_heads": 4, "n_kv_heads": 4}},
        "one prelude layer": {"model": {"prelude_layers": 1}},
        "tied embeddings": {"model": {"tie_embeddings": True}},
        "an output embedding of its own": {"model": {"tie_embeddings": False}},
        "loop embedding": {"model": {"loop_embedding": True}},
        "depth adapter of rank 4": {"model": {"lora_rank": 4}},
        "four experts": {"model": {"n_experts": 4, "expert_dim": 32}},
        "halting": {"model": {"halting": "act"}},
        "no halting": {"model": {"halting": "none"}},
        f"plan `fixed`, {needed}": {"depth": {"name": "fixed", "loops": needed, **learned}},
        f"plan `uniform`, 1 to {most}": {"depth": {"name": "uniform", "least": 1, "most": most, **learned}},
        "`difficulty` without extra": {"depth": {"extra": 0}},
        "gradients through the last loop": {"depth": {"grad_loops": 1}},
        "gradients through the last 2 loops": {"depth": {"grad_loops": 2}},
        "state starts at zeros": {"model": {"state_init": "zeros"}},
        "state starts at the encoded input": {"model": {"state_init": "input"}},
        "the next loop's move in the loss": {"training": {"settle_weight": 1.0}},
        "without the next loop's move": {"training": {"settle_weight": 0.0}},
    }
    rows = {name: Change(change) for name, change in fields.items() if not change or altered(run, change) != run}
    rows["no carry (A = 0.0001)"] = Change({}, no_carry)
    rows["no prelude norm"] = Change({}, no_prelude_norm)
    return rows


def _windows(window: int | None) -> dict[str, dict[str, Any]]:
    """How far the recurrent block sees; with half as many layers, twice as far in one layer is as far in a loop."""
    if window is None:
        return {f"recurrent window: {narrow}": {"model": {"window": narrow}} for narrow in (8, 24)}
    wide = 2 * window - 1
    return {
        "recurrent window: none (full)": {"model": {"window": None}},
        f"one recurrent layer, window {wide}": {"model": {"recurrent_layers": 1, "window": wide}},
    }


def main() -> None:
    parser = options(__doc__, seeds="0,1")
    parser.add_argument("--changes", nargs="+", default=[""], help="Rows whose names begin so; by default all.")
    chosen = parser.parse_args()
    base = altered(recipe(chosen.recipe), BASES.get(chosen.recipe, {}))
    if chosen.steps:
        base = altered(base, {"training": {"steps": chosen.steps}})
    lengths, loops = base.sweep_lengths or (), base.sweep_loops or ()
    print_headings("change", "seed", "s", "loss", *(f"{length} at {n}" for length in lengths for n in loops))
    for name, change in changes(base).items():
        if not name.startswith(tuple(chosen.changes)):
            continue
        for seed in chosen.seeds:
            run = altered(base, change.run, {"training": {"seed": seed}})
            figures = trained(run, chosen.problems, change.model)
            print_row(name, seed, f"{figures.seconds:.0f}", f"{figures.loss:.4f}", *map(cell, figures.rows))


if __name__ == "__main__":
    main()
