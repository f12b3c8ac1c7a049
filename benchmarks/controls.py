"""A task's recipe against nets of fixed depth: python benchmarks/controls.py RECIPE.

All consist of the recipe's blocks and learn from the same batches. "once" has the looped net's layers and runs them
once; "deep" runs once as many layers as the looped net does in its deepest pass of training, each with weights of its
own. Neither has a loop knob.

Each net is trained at the recipe's learning rate first. While a net does not solve every problem of the trained
length, further rates are tried on the first seed; the one with the best accuracy at that length serves all seeds.
"""

from __future__ import annotations

from typing import Any

from from_recipe import altered, cell, most_loops, options, print_headings, print_row, recipe, trained
from open_mythos.analysis.depth_sweep import SweepRow
from open_mythos.recipes.run_config import TaskRun

LOOPS = 64
"""The looped net is measured at this depth, at every length."""


def nets(run: TaskRun) -> dict[str, dict[str, Any]]:
    """Each net's changes to the recipe."""
    n_layers = run.model.recurrent_layers
    found: dict[str, dict[str, Any]] = {"looped": {"sweep_loops": [LOOPS]}}
    for depth, layers in (("once", n_layers), ("deep", n_layers * most_loops(run))):
        for sight, windows in (("window", {}), ("full attention", {"window": None, "outer_window": None})):
            model = {"recurrent_layers": layers, "state_init": "zeros", "halting": "none", **windows}
            found[f"{depth}, {sight}"] = {
                "model": model,
                "depth": {"name": "fixed", "loops": 1},
                "training": {"settle_weight": 0.0},
                "sweep_loops": [1],
            }
    return found


def main() -> None:
    parser = options(__doc__, seeds="0,1,2")
    parser.add_argument("--nets", nargs="+", default=[""], help="Those whose names begin so; by default all.")
    parser.add_argument("--factors", nargs="+", type=float, default=[1, 2, 0.5], help="On the recipe's rate, in turn.")
    chosen = parser.parse_args()
    base = recipe(chosen.recipe)
    lengths = sorted({base.longest, 2 * base.longest, max(base.sweep_lengths or (1,))})
    base = altered(base, {"sweep_lengths": lengths, "training": {"steps": chosen.steps or base.training.steps}})
    print_headings("net", "parameters", "rate", "seed", "s", "loss", *(f"length {length}" for length in lengths))

    def measured(name: str, rate: float, seed: int) -> SweepRow:
        """The row of the trained length, once the net has been trained and its figures are printed."""
        run = altered(base, nets(base)[name], {"training": {"seed": seed, "optim": {"learning_rate": rate}}})
        parameters, seconds, loss, rows = trained(run, chosen.problems)
        print_row(name, f"{parameters:,}", f"{rate:g}", seed, f"{seconds:.0f}", f"{loss:.4f}", *map(cell, rows))
        return rows[0]

    first, *others = chosen.seeds
    for name in filter(lambda name: name.startswith(tuple(chosen.nets)), nets(base)):
        accuracies: dict[float, float] = {}
        for factor in chosen.factors:
            rate = factor * base.training.optim.learning_rate
            row = measured(name, rate, first)
            accuracies[rate] = row["accuracy"] or 0.0
            if row["exact_match"] == 1:
                break
        for seed in others:
            measured(name, max(accuracies, key=accuracies.__getitem__), seed)


if __name__ == "__main__":
    main()
