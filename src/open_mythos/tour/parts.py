"""The nine parts of the tour; each measures one promise and returns what it found.

Main entry: `run_parts`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from open_mythos.analysis import plots
from open_mythos.analysis.depth_sweep import depth_sweep
from open_mythos.analysis.halting import halting_matrix
from open_mythos.analysis.jacobian import jacobian_spectral_radius
from open_mythos.analysis.kv_memory import compare_kv_cache
from open_mythos.analysis.report import Section
from open_mythos.analysis.routing import expert_load
from open_mythos.analysis.stability import spectrum, stability
from open_mythos.model.mythos import OpenMythos
from open_mythos.presets import mythos_tutorial_gqa, mythos_tutorial_mla
from open_mythos.tour.recipe import Trained, TourRecipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    section = Section(
        title="Model sizes",
        text="Prelude, one recurrent block, coda. More loops make the model deeper, with the same weights.",
        rows=rows,
    )
    return Part("model_sizes", {str(row["model"]): row["parameters"] for row in rows}, section)


def _depth(model: OpenMythos, n_loops: int) -> int:
    config = model.config
    return config.prelude_layers + n_loops * config.recurrent_layers + config.coda_layers


def kv_cache(gqa: OpenMythos, mla: OpenMythos) -> Part:
    """Part 2: the cache of both kinds of attention, measured and planned."""
    found = compare_kv_cache(gqa, mla)
    rows = [
        {"attention": name, "measured bytes": size.measured, "planned bytes": size.planned, "entries": size.layer_keys}
        for name, size in (("GQA", found.gqa), ("MLA", found.mla))
    ]
    section = Section(
        title="KV cache",
        text=f"The keys and values of {found.seq_len} tokens in {found.n_loops} loops. Multi-latent attention caches one "
        "latent and one shared rotary key per token, instead of a key and a value for each head.",
        verdict=f"MLA's cache is {found.ratio:.2f} times smaller, and the planner's figures are the measured ones.",
        rows=rows,
        picture=_png(plots.kv_cache(found)),
    )
    data = {"ratio": found.ratio, "gqa_bytes": found.gqa.measured, "mla_bytes": found.mla.measured}
    return Part("kv_cache", data, section)


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
        {"A": when, "smallest": found.smallest, "largest (rho)": found.rho, "mean": found.mean}
        for when, found in (("new", before), ("after 30 steps of Adam at lr 1.0", after))
    ]
    section = Section(
        title="Stability by construction",
        text="Each loop begins with A*h + B*e. A is diagonal, and its entries cannot leave (0, 1), whatever the optimizer "
        "does to the parameters behind it: the state neither explodes nor is erased.",
        verdict=f"After abuse, A lies between {after.smallest:.2g} and {after.rho:.4f}.",
        rows=rows,
    )
    data = {"rho_new": before.rho, "rho_abused": after.rho, "smallest_abused": after.smallest}
    return Part("stability_by_construction", data, section)


def task(recipe: TourRecipe) -> Part:
    """Part 4: what is learned."""
    ids, targets = recipe.task.batch(1, recipe.max_bits, torch.Generator().manual_seed(recipe.seed))
    bits, parities = (" ".join(str(int(x) - 1) for x in row[0]) for row in (ids, targets))
    section = Section(
        title="The task",
        text="After every bit: is the number of ones so far odd? The last answer needs all bits. A layer of this model "
        f"sees {recipe.model.loop_reach} positions, so that information travels a few positions per loop: long strings "
        "need many loops. Training uses strings of "
        f"1 to {recipe.max_bits} bits, with one loop per {recipe.task.bits_per_loop} bits and never more than "
        f"{recipe.trained_loops}.",
        preformatted=f"bits     {bits}\nparity   {parities}",
    )
    return Part("task", {"max_bits": recipe.max_bits, "max_loops": recipe.trained_loops}, section)


def training(recipe: TourRecipe, trained: Trained) -> Part:
    """Part 5: the training run, and the state it leaves."""
    ids, _ = recipe.task.batch(8, 24, torch.Generator().manual_seed(recipe.seed + 1))
    report = stability(trained.model, ids, 32)
    radius = jacobian_spectral_radius(trained.model, ids[:1], 32)
    last = trained.steps[-20:]
    loss = sum(step.loss for step in last) / len(last)
    rows = [
        {"quantity": "steps", "value": len(trained.steps)},
        {"quantity": "seconds", "value": trained.seconds},
        {"quantity": "loss, mean of the last 20 steps", "value": loss},
        {"quantity": "accuracy, mean of the last 20 steps", "value": sum(step.accuracy for step in last) / len(last)},
        {"quantity": "rho(A)", "value": report.spectrum.rho},
        {"quantity": "largest state norm in 32 loops", "value": max(norm.largest for norm in report.loops)},
        {"quantity": "its proved bound", "value": report.limit},
        {"quantity": "spectral radius of a whole loop's Jacobian, after 32 loops", "value": radius},
    ]
    section = Section(
        title="Training",
        text="AdamW on random strings. The state stays far below its proved bound; a spectral radius below 1 of the whole "
        "loop's Jacobian means that the state has settled: further loops change nothing.",
        rows=rows,
        picture=_png(plots.training_loss([step.loss for step in trained.steps])),
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
    best = {length: max(row["accuracy"] or 0.0 for row in sweep if row["length"] == length) for length in recipe.sweep_lengths}
    found = ", ".join(f"{accuracy:.3f} on {length} bits" for length, accuracy in best.items())
    section = Section(
        title="Depth extrapolation",
        text=f"Trained on at most {recipe.max_bits} bits with at most {recipe.trained_loops} loops. The weights stay as "
        "they are; only the number of loops changes. Longer strings need more loops, and more than needed does no harm.",
        verdict=f"Best accuracy: {found}.",
        rows=by_loops,
        picture=_png(plots.depth_sweep(sweep, recipe.trained_loops, chance=0.5)),
    )
    return Part("depth_sweep", {"rows": sweep}, section)


def halting(recipe: TourRecipe, model: OpenMythos) -> Part:
    """Part 7: where each position stops."""
    ids, targets = recipe.task.batch(64, 24, torch.Generator().manual_seed(recipe.seed + 3))
    report = halting_matrix(model, ids, 32)
    with torch.no_grad():
        accuracy = float((model(ids, 32).argmax(-1) == targets).float().mean())
    exits = report.mean_exit_by_position
    rows = [{"bit": bit + 1, "mean exit loop": exits[bit]} for bit in range(0, len(exits), 4)]
    section = Section(
        title="Adaptive computation",
        text="Every position stops when its halting probabilities add up to the threshold, and is then frozen: later "
        "loops neither change nor compute it. Early bits are easy and stop early; late bits have to wait for information.",
        verdict=f"Of 32 loops, {report.mean_exit:.1f} were needed on average, at accuracy {accuracy:.3f}.",
        rows=rows,
        picture=_png(plots.halting(report)),
    )
    return Part("halting", {"mean_exit": report.mean_exit, "exit_by_position": exits, "accuracy": accuracy}, section)


def routing(recipe: TourRecipe, model: OpenMythos) -> Part:
    """Part 8: whether all experts work."""
    ids, _ = recipe.task.batch(64, 24, torch.Generator().manual_seed(recipe.seed + 4))
    report = expert_load(model, ids, recipe.trained_loops)
    total = report.layers[0]
    rows = [
        {"expert": expert, "share of slots": total.shares[expert], "slots": slots}
        for expert, slots in enumerate(total.slots)
    ]
    section = Section(
        title="Expert load",
        text="A bias on the router's logits, moved a little after every training step, keeps the experts busy without an "
        "auxiliary loss.",
        verdict=f"Expert {total.busiest} is the busiest, with {total.shares[total.busiest]:.1%} of the slots; "
        f"an even share is {1 / len(total.slots):.1%}.",
        rows=rows,
        picture=_png(plots.expert_load(report)),
    )
    return Part("expert_load", {"shares": total.shares, "imbalance": total.imbalance}, section)


def answers(recipe: TourRecipe, model: OpenMythos) -> Part:
    """Part 9: one string, answered at several depths."""
    ids, targets = recipe.task.batch(1, 24, torch.Generator().manual_seed(recipe.seed + 5))
    lines = [f"{'bits':<12}{_digits(ids)}", f"{'parity':<12}{_digits(targets)}"]
    right: dict[int, int] = {}
    with torch.no_grad():
        for n_loops in (1, 2, 4, 6, 12, 32):
            guess = model(ids, n_loops).argmax(-1)
            right[n_loops] = int((guess == targets).sum())
            lines.append(f"{f'{n_loops} loops':<12}{_digits(guess)}   {right[n_loops]} of {ids.shape[1]} right")
            lines.append(" " * 12 + " ".join(" " if ok else "^" for ok in (guess == targets)[0].tolist()))
    section = Section(
        title="Answers",
        text="One string of 24 bits, longer than any in training, answered at several depths. Wrong answers are marked.",
        preformatted="\n".join(line.rstrip() for line in lines if line.strip()),
    )
    return Part("answers", {"right_by_loops": {str(loops): count for loops, count in right.items()}}, section)


def _digits(row: torch.Tensor) -> str:
    return " ".join(str(int(x) - 1) for x in row[0])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def as_data(recipe: TourRecipe, parts: list[Part]) -> dict[str, Any]:
    """The whole tour as plain data, for `results.json`."""
    training = {"model": recipe.model.to_dict(), "fit": asdict(recipe.training), "halting": asdict(recipe.halting)}
    return {"seed": recipe.seed, "recipe": training, **{part.key: part.data for part in parts}}
