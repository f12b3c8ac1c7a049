"""A task's recipe against nets of fixed depth: python benchmarks/controls.py RECIPE.

All consist of the recipe's blocks and learn from the same batches. "once" has the looped net's layers and runs them
once; "deep" runs once as many layers as the looped net does in its deepest pass of training, each with weights of its
own. Neither has a loop knob.

Each net is trained at the recipe's learning rate first. While a net does not solve every problem of the trained
length, further rates are tried on the first seed; the one with the best accuracy at that length serves all seeds.
"""

from __future__ import annotations

from typing import Any

from from_recipe import Figures, altered, cell, most_loops, options, print_headings, print_row, recipe, trained
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
            found[f"{depth}, {sight}"] = {"model": model, "depth": {"name": "fixed", "loops": 1}, "sweep_loops": [1]}
    return found


def of_all_seeds(run: TaskRun, seeds: list[int], rates: list[float], problems: int) -> tuple[float, dict[int, Figures]]:
    """The learning rate that serves all seeds, and the figures of each."""

    def figures(seed: int, rate: float) -> Figures:
        return trained(altered(run, {"training": {"seed": seed, "optim": {"learning_rate": rate}}}), problems)

    tried: dict[float, Figures] = {}
    for rate in rates:
        tried[rate] = figures(seeds[0], rate)
        if tried[rate].rows[0]["exact_match"] == 1:
            break
    best = max(tried, key=lambda rate: tried[rate].rows[0]["accuracy"] or 0.0)
    return best, {seeds[0]: tried[best]} | {seed: figures(seed, best) for seed in seeds[1:]}


def main() -> None:
    parser = options(__doc__, seeds="0,1,2")
    parser.add_argument("--nets", nargs="+", help="Those whose names begin so; by default all.")
    parser.add_argument(
        "--factors", nargs="+", type=float, default=[1, 0.5, 0.25], help="On the learning rate, in turn."
    )
    chosen = parser.parse_args()
    run = recipe(chosen.recipe)
    steps = chosen.steps or run.training.steps
    lengths = sorted({run.longest, 2 * run.longest, max(run.sweep_lengths or (1,))})
    rates = [factor * run.training.optim.learning_rate for factor in chosen.factors]
    print_headings("net", "parameters", "rate", "seed", "s", "loss", *(f"length {length}" for length in lengths))
    for name, changes in nets(run).items():
        if not name.startswith(tuple(chosen.nets or [""])):
            continue
        net = altered(run, changes, {"training": {"steps": steps}, "sweep_lengths": lengths})
        rate, found = of_all_seeds(net, chosen.seeds, rates, chosen.problems)
        for seed, figures in sorted(found.items(), key=lambda item: item[1].rows[-1]["accuracy"] or 0):
            about = (
                name,
                f"{figures.parameters:,}",
                f"{rate:g}",
                seed,
                f"{figures.seconds:.0f}",
                f"{figures.loss:.4f}",
            )
            print_row(*about, *map(cell, figures.rows))


if __name__ == "__main__":
    main()
