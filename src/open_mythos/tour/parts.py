"""The nine parts of the tour; each measures one promise and returns what it found.

Main entry: `run_parts`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from open_mythos.analysis import plots
from open_mythos.analysis.depth_sweep import depth_sweep
from open_mythos.analysis.halting import halting_matrix, under_halting
from open_mythos.analysis.jacobian import jacobian_spectral_radius
from open_mythos.analysis.kv_memory import KVCacheComparison, compare_kv_cache
from open_mythos.analysis.memory_plan import plan_inference, plan_training
from open_mythos.analysis.report import Row, Section
from open_mythos.analysis.routing import expert_load
from open_mythos.analysis.stability import spectrum, stability
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import mythos_tutorial_gqa, mythos_tutorial_mla
from open_mythos.recipes.run_config import run_to_dict
from open_mythos.tour.recipe import TourRecipe, Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Of a state's size. Trained on at most four loops, some states keep swinging by a tenth.
_TOLERANCE = 0.2


@dataclass(frozen=True)
class Part:
    """One part: its figures as plain data under `key`, and the same for people."""

    key: str
    data: dict[str, Any]
    section: Section


def run_parts(recipe: TourRecipe, trained: Trained) -> Iterator[Part]:
    """The parts in order, each computed when it is asked for."""
    torch.manual_seed(recipe.seed)
    gqa, mla = OpenMythos(mythos_tutorial_gqa()), OpenMythos(mythos_tutorial_mla())
    yield model_sizes(gqa, mla, trained.model)
    yield kv_cache(gqa, mla)
    yield stable_injection(mla)
    yield task(recipe)
    yield training(recipe, trained)
    yield extrapolation(recipe, trained.model)
    yield halting(recipe, trained.model)
    yield routing(recipe, trained.model)
    yield answers(recipe, trained.model)


def model_sizes(gqa: OpenMythos, mla: OpenMythos, toured: OpenMythos) -> Part:
    """Part 1: parameters, which do not grow with the loops."""
    models = {"tutorial, GQA": gqa, "tutorial, MLA": mla, "this tour's model": toured}
    rows = [
        {
            "model": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers at 1 loop": _depth(model, 1),
            "layers at 16 loops": _depth(model, 16),
        }
        for name, model in models.items()
    ]
    plans = {}
    for name, model in models.items():
        plans[f"{name}: serving"] = plan_inference(model.config, batch=64, seq_len=24, n_loops=4)
        plans[f"{name}: training"] = plan_training(model.config, batch=64, seq_len=24, n_loops=4)
    section = Section(
        title="Model sizes",
        text="A prelude, one recurrent block and a coda. More loops make the model deeper, with the same weights. What "
        "serving and training need in memory is planned from the config alone: here for 64 sequences of 24 tokens in "
        "4 loops.",
        verdict=f"At 16 loops this tour's model is {_depth(toured, 16)} layers deep, with the parameters of "
        f"{_depth(toured, 1)}.",
        rows=rows,
        pictures={"memory_plan": _png(plots.memory_plan(plans))},
    )
    return Part("model_sizes", {str(row["model"]): row["parameters"] for row in rows}, section)


def _depth(model: OpenMythos, n_loops: int) -> int:
    config = model.config
    return config.prelude_layers + n_loops * config.recurrent_layers + config.coda_layers


def kv_cache(gqa: OpenMythos, mla: OpenMythos) -> Part:
    """Part 2: the cache of both kinds of attention, measured and planned."""
    found = compare_kv_cache(gqa, mla)
    rows = [
        {"attention": name, "layers x loops": size.layer_keys, "measured B": size.measured, "planned B": size.planned}
        for name, size in (("GQA", found.gqa), ("MLA", found.mla))
    ]
    section = Section(
        title="KV cache",
        text=f"The keys and values of {found.seq_len} tokens in {found.n_loops} loops. Multi-latent attention (MLA) "
        "caches one latent and one shared rotary key per token; grouped-query attention (GQA) a key and a value for "
        "each of its key-value heads.",
        verdict=f"MLA's cache is {found.ratio:.2f} times smaller. The memory plan {_exactness(found)}.",
        rows=rows,
        pictures={"kv_cache": _png(plots.kv_cache(found))},
    )
    data = {"ratio": found.ratio, "gqa_bytes": found.gqa.measured, "mla_bytes": found.mla.measured}
    return Part("kv_cache", data, section)


def _exactness(found: KVCacheComparison) -> str:
    sizes = (found.gqa, found.mla)
    if all(size.measured == size.planned for size in sizes):
        return "gave both sizes to the byte"
    return f"was off by {max(abs(size.measured - size.planned) for size in sizes):,} bytes"


def stable_injection(model: OpenMythos) -> Part:
    """Part 3: the spectral radius of A, before and after an optimizer that wrecks everything else."""
    before = spectrum(model)
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    model.train()
    for _ in range(30):
        ids = torch.randint(model.config.vocab_size, (2, 16), generator=random)
        optimizer.zero_grad()
        model(ids, n_loops=2).square().mean().backward()
        optimizer.step()
    after = spectrum(model)
    rows = [
        {"model": when, "smallest A": found.smallest, "mean A": found.mean, "largest A (rho)": found.rho}
        for when, found in (("new", before), ("after 30 steps of Adam at learning rate 1.0", after))
    ]
    section = Section(
        title="Stability by construction",
        text="Each loop begins with `A*h + B*e`. A is diagonal, and its entries cannot leave (0, 1), whatever the "
        "optimizer does to the parameters behind it: the state neither explodes nor is erased.",
        verdict=f"After abuse, every entry of A lies between {after.smallest:.2g} and {after.rho:.4f}.",
        rows=rows,
    )
    data = {"rho_new": before.rho, "rho_abused": after.rho, "smallest_abused": after.smallest}
    return Part("stability_by_construction", data, section)


def task(recipe: TourRecipe) -> Part:
    """Part 4: what is learned."""
    ids, targets, _ = recipe.task.batch(1, recipe.run.longest, torch.Generator().manual_seed(recipe.seed))
    bits, parities = (" ".join(str(int(x) - 1) for x in row[0]) for row in (ids, targets))
    section = Section(
        title="The task",
        text="After every bit: is the number of ones so far odd? The last answer needs all bits. A layer of this "
        f"model sees {recipe.model.loop_reach} positions, so that information travels a few positions per loop: long "
        f"strings need many loops. Training uses strings of 1 to {recipe.run.longest} bits, with one loop per "
        f"{recipe.run.longest // recipe.trained_loops} bits and never more than {recipe.trained_loops}.",
        preformatted=f"bits     {bits}\nparity   {parities}",
    )
    return Part("task", {"max_bits": recipe.run.longest, "max_loops": recipe.trained_loops}, section)


def training(recipe: TourRecipe, trained: Trained) -> Part:
    """Part 5: the training run, and the state it leaves."""
    ids, _, _ = recipe.task.batch(8, 24, torch.Generator().manual_seed(recipe.seed + 1))
    report = stability(trained.model, ids, 32)
    radius = jacobian_spectral_radius(trained.model, ids[:1], 32)
    last = trained.steps[-20:]
    loss = sum(step.loss for step in last) / len(last)
    accuracy = sum(step.accuracy for step in last) / len(last)
    largest = max(norm.largest for norm in report.loops)
    rows: list[Row] = [
        {"quantity": "steps", "value": len(trained.steps)},
        {"quantity": "seconds", "value": f"{trained.seconds:.0f}"},
        {"quantity": f"loss, mean of the last {len(last)} steps", "value": loss},
        {"quantity": f"accuracy, mean of the last {len(last)} steps", "value": accuracy},
        {"quantity": "rho(A)", "value": report.spectrum.rho},
        {"quantity": "largest norm of the state in 32 loops", "value": largest},
        {"quantity": "its proved bound, for any number of loops", "value": report.limit},
        {"quantity": "spectral radius of a whole loop's Jacobian after 32 loops", "value": radius},
    ]
    change = "shrink" if radius < 1 else "grow"
    section = Section(
        title="Training",
        text="AdamW on random strings. The norm of the "
        "state has a proved bound. The spectral radius of a whole loop's Jacobian says what becomes of a small change "
        "of the state: below 1 it dies out, and the state comes to rest.",
        verdict=f"Accuracy {accuracy:.3f} at the end of training. The state reaches {largest / report.limit:.0%} of "
        f"its bound; after 32 loops small changes {change} by a factor of {radius:.2f} per loop.",
        rows=rows,
        pictures={
            "training": _png(plots.training_loss([step.loss for step in trained.steps])),
            "stability": _png(plots.stability(report)),
        },
    )
    data = {"steps": len(trained.steps), "seconds": trained.seconds, "loss": loss, "rho": report.spectrum.rho}
    return Part("training", {**data, "jacobian_radius": radius, "state_bound": report.limit}, section)


def extrapolation(recipe: TourRecipe, model: OpenMythos) -> Part:
    """Part 6: accuracy at depths and lengths that training never saw; only the loop knob is turned."""
    random = torch.Generator().manual_seed(recipe.seed + 2)
    batches = [recipe.task.batch(recipe.sweep_strings, length, random) for length in recipe.sweep_lengths]
    sweep = depth_sweep(model, batches, recipe.sweep_loops)
    by_loops = [
        {"loops": loops, **{f"{row['length']} bits": row["accuracy"] for row in sweep if row["n_loops"] == loops}}
        for loops in recipe.sweep_loops
    ]
    at = {(row["length"], row["n_loops"]): row["accuracy"] or 0.0 for row in sweep}
    deep = max(recipe.sweep_loops)
    shallow = max((loops for loops in recipe.sweep_loops if loops <= recipe.trained_loops), default=deep)
    found = ", ".join(
        f"{at[length, shallow]:.3f} to {at[length, deep]:.3f} on {length} bits" for length in recipe.sweep_lengths
    )
    section = Section(
        title="Depth extrapolation",
        text=f"Trained on at most {recipe.run.longest} bits with at most {recipe.trained_loops} loops. The weights "
        "stay as they are; only the number of loops changes. A model that has learned the rule itself needs more loops "
        "for longer strings, and takes no harm from more loops than needed.",
        verdict=f"From {shallow} to {deep} loops, accuracy goes from {found}.",
        rows=by_loops,
        pictures={"depth_sweep": _png(plots.depth_sweep(sweep, recipe.trained_loops, chance=0.5))},
    )
    return Part("depth_sweep", {"rows": sweep}, section)


def halting(recipe: TourRecipe, model: OpenMythos) -> Part:
    """Part 7: where each position stops."""
    length, most = recipe.sweep_lengths[len(recipe.sweep_lengths) // 2], recipe.model.max_loop_iters
    ids, targets, _ = recipe.task.batch(64, length, torch.Generator().manual_seed(recipe.seed + 3))
    settling = under_halting(model, "settled", _TOLERANCE)
    report = halting_matrix(settling, ids, most)
    fixed = depth_sweep(under_halting(model, "none"), (ids, targets), range(1, most + 1))
    with torch.no_grad():
        accuracy = float((settling(ids, most).argmax(-1) == targets).float().mean())
    enough = next((row["n_loops"] for row in fixed if (row["accuracy"] or 0.0) >= accuracy), None)
    takes = f"that takes {enough}" if enough is not None else f"{most} do not reach that"
    exits = report.mean_exit_by_position
    rows = [
        {"bit": bit + 1, "loops that it needs": recipe.task.loops(bit + 1), "mean exit loop": exits[bit]}
        for bit in range(3, length, max(1, length // 8))
    ]
    section = Section(
        title="Adaptive computation",
        text=f"A position stops once a loop moves neither it nor any position before it by more than {_TOLERANCE:.0%}, "
        "and is then frozen: later loops do not compute it, and read its keys and values as they are. Nothing was "
        "trained for this: attention is causal, so that states that a loop leaves as they were, with all before them, "
        f"stay so. 64 strings of {length} bits.",
        verdict=f"Positions used {report.mean_exit:.1f} loops on average, the first four bits {sum(exits[:4]) / 4:.1f} "
        f"and the last four {sum(exits[-4:]) / 4:.1f}, at accuracy {accuracy:.4f}. With one number of loops for all, "
        f"{takes}.",
        rows=rows,
        pictures={"halting": _png(plots.halting(report))},
    )
    data = {
        "length": length,
        "mean_exit": report.mean_exit,
        "exit_by_position": exits,
        "accuracy": accuracy,
        "fixed_loops": enough,
    }
    return Part("halting", data, section)


def routing(recipe: TourRecipe, model: OpenMythos) -> Part:
    """Part 8: whether all experts work."""
    ids, _, _ = recipe.task.batch(64, 24, torch.Generator().manual_seed(recipe.seed + 4))
    report = expert_load(model, ids, recipe.trained_loops)
    layers = report.layers
    worst = max(range(len(layers)), key=lambda layer: layers[layer].imbalance)
    total = layers[worst]
    rows = [
        {
            "expert": expert,
            **{f"share, layer {layer}": f"{load.shares[expert]:.1%}" for layer, load in enumerate(layers)},
        }
        for expert in range(len(total.slots))
    ]
    section = Section(
        title="Expert load",
        text="A bias on the router's logits, moved a little after every training step, keeps the experts busy without "
        f"an auxiliary loss. Each of 64 strings of 24 bits takes {recipe.model.n_experts_per_tok} slots per bit and "
        f"loop, here in at most {recipe.trained_loops} loops.",
        verdict=f"The busiest expert is number {total.busiest} of layer {worst}, with "
        f"{total.shares[total.busiest]:.1%} of the layer's slots; "
        f"an even share is {1 / len(total.slots):.1%}.",
        rows=rows,
        pictures={"expert_load": _png(plots.expert_load(report, worst))},
    )
    data = {"shares_by_layer": [load.shares for load in layers], "imbalance": total.imbalance}
    return Part("expert_load", data, section)


def answers(recipe: TourRecipe, model: OpenMythos) -> Part:
    """Part 9: one string, answered at several depths."""
    ids, targets, _ = recipe.task.batch(1, 24, torch.Generator().manual_seed(recipe.seed + 5))
    lines = [f"{'bits':<12}{_digits(ids)}", f"{'parity':<12}{_digits(targets)}", ""]
    right: dict[int, int] = {}
    with torch.no_grad():
        for n_loops in (1, 2, 4, 6, 12, 32):
            guess = model(ids, n_loops).argmax(-1)
            right[n_loops] = int((guess == targets).sum())
            lines.append(f"{_loops(n_loops):<12}{_digits(guess)}   {right[n_loops]} of {ids.shape[1]} right")
            if right[n_loops] < ids.shape[1]:
                lines.append(" " * 12 + " ".join(" " if ok else "^" for ok in (guess == targets)[0].tolist()))
    few, many = min(right), max(right)
    section = Section(
        title="Answers",
        text=f"One string of {ids.shape[1]} bits, longer than any in training, answered at several depths. A mark `^` "
        "stands below each wrong answer.",
        verdict=f"{right[few]} of {ids.shape[1]} right with {_loops(few)}, {right[many]} with {_loops(many)}.",
        preformatted="\n".join(line.rstrip() for line in lines),
    )
    return Part("answers", {"right_by_loops": {str(loops): count for loops, count in right.items()}}, section)


def _loops(count: int) -> str:
    return "1 loop" if count == 1 else f"{count} loops"


def _digits(row: torch.Tensor) -> str:
    return " ".join(str(int(x) - 1) for x in row[0])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def as_data(recipe: TourRecipe, parts: list[Part]) -> dict[str, Any]:
    """The whole tour as plain data, for `results.json`."""
    run = {**run_to_dict(recipe.run), "model": recipe.model.to_dict()}
    return {"seed": recipe.seed, "recipe": run, **{part.key: part.data for part in parts}}
