"""What training one model on a cluster needs per rank, on paper: memory, and what each rank receives per step.

Run it with `python benchmarks/cluster_plan.py`; docs/cluster.md shows what it prints and says what is assumed. Nothing
is measured here, and of the layouts only the first is implemented.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from open_mythos.analysis.memory_plan import plan_training
from open_mythos.config import MythosConfig
from open_mythos.model.cost import forward_flops, parameter_counts
from open_mythos.presets import preset

GB = 1e9
HALF, SINGLE = torch.bfloat16.itemsize, torch.float32.itemsize
"""Bytes of a number that is computed with, and of one that is kept."""


@dataclass(frozen=True)
class Work:
    """One step of one rank: `tokens` in sequences of `seq_len`, `loops` loops, gradients through the last `learned`."""

    seq_len: int = 4096
    sequences: int = 1
    loops: int = 32
    learned: int = 8

    @property
    def tokens(self) -> int:
        return self.seq_len * self.sequences

    @property
    def passes(self) -> int:
        """Times that a step goes through a loop: forward, computed again, and backward."""
        return self.loops + 2 * self.learned


@dataclass(frozen=True)
class Layout:
    """Where the state is: each number on one of `shards` ranks, `replicas` times in all."""

    name: str
    shards: int
    replicas: int = 1
    expert_ranks: int = 1
    """Ranks of a node among which the routed experts are divided; tokens travel to them."""
    per_layer: bool = False
    """Weights of the looped layers are gathered for every use and dropped, instead of once per step; likewise, their
    gradients are summed for every loop that has some."""
    gathered: int = HALF
    """Bytes of a gathered weight; a gradient that is to be summed has as many."""


@dataclass(frozen=True)
class Needs:
    """Bytes per rank; those on the way are received per step."""

    state: float
    """Weights, gradients and AdamW's moments in float32, in shards."""
    whole: float
    """Weights that are whole for the time being, and their gradients."""
    activations: float
    weights_in: float
    gradients_in: float
    tokens_in: float

    @property
    def memory(self) -> float:
        return self.state + self.whole + self.activations

    @property
    def traffic(self) -> float:
        return self.weights_in + self.gradients_in + self.tokens_in


def needs(config: MythosConfig, layout: Layout, work: Work) -> Needs:
    """What one rank of the layout needs for its step."""
    counts = parameter_counts(config)
    experts = config.recurrent_layers * config.n_experts * 3 * config.dim * config.expert_dim
    local_experts = experts / layout.expert_ranks
    looped = counts.recurrent - experts + local_experts
    one_end = counts.prelude / config.prelude_layers
    # Looped layers that are whole at a time: all; or one in use and the next on its way.
    share = min(1, 2 / config.recurrent_layers) if layout.per_layer else 1
    whole = (counts.embedding + counts.head + 2 * one_end + share * looped) * 2 * layout.gathered
    plan = plan_training(config, seq_len=work.seq_len, n_loops=work.loops, checkpoint_loops=True)
    kept = plan_training(
        config, seq_len=work.seq_len, n_loops=work.learned, dtype=torch.bfloat16, checkpoint_loops=True
    ).activations
    state = (plan.weights + plan.gradients + plan.optimizer) / (layout.shards * layout.expert_ranks)
    uses, sums = (work.passes, work.learned) if layout.per_layer else (1, 1)
    among = layout.shards * layout.expert_ranks  # ranks that share what is not a routed expert
    shared, expert = ((n - 1) / n * layout.gathered for n in (among, layout.shards))
    dense = looped - local_experts
    root, blocks = counts.embedding + counts.head, counts.prelude + counts.coda
    weights_in = shared * (root + 2 * blocks + uses * dense) + expert * uses * local_experts
    gradients_in = shared * (root + blocks + sums * dense) + expert * sums * local_experts
    if layout.replicas > 1:  # the sum over replicas of what a rank's shard has, there and back
        owned = counts.total / layout.shards
        gradients_in += 2 * (layout.replicas - 1) / layout.replicas * owned * SINGLE
    sent = (layout.expert_ranks - 1) / layout.expert_ranks * config.n_experts_per_tok * config.dim * HALF
    tokens_in = 2 * sent * work.tokens * config.recurrent_layers * work.passes
    return Needs(state, whole, kept * work.sequences, weights_in, gradients_in, tokens_in)


def layouts(nodes: int, per_node: int) -> list[Layout]:
    """The ways to train that the document compares."""
    ranks = nodes * per_node
    return [
        Layout(f"FSDP {ranks}, as implemented", ranks, gathered=SINGLE),
        Layout(f"(a) FSDP {ranks}, by layer and use", ranks, per_layer=True),
        Layout(f"(b) hybrid: {per_node} shards x {nodes}", per_node, nodes, per_layer=True),
        Layout(f"(b') hybrid: {nodes} shards x {per_node}", nodes, per_node, per_layer=True),
        Layout(f"(c) {per_node} expert ranks, FSDP {nodes}, once", nodes, expert_ranks=per_node),
        Layout("(c') the same, by layer and use", nodes, expert_ranks=per_node, per_layer=True),
    ]


def compute_flops(config: MythosConfig, work: Work) -> float:
    """Matrix-product FLOPs of one rank's step; the backward has two for each one of the forward."""
    per_token = forward_flops(config, work.seq_len)
    looped = per_token.loop * (work.loops + 3 * work.learned)
    return work.tokens * (3 * per_token.total(0) + looped)


def table(config: MythosConfig, work: Work, rows: list[Layout]) -> str:
    """A Markdown table of the layouts, in GB per rank."""
    heads = ("state", "whole", "activations", "memory", "weights in", "gradients in", "tokens in", "traffic")
    lines = [f"| layout | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for layout in rows:
        n = needs(config, layout, work)
        figures = (n.state, n.whole, n.activations, n.memory, n.weights_in, n.gradients_in, n.tokens_in, n.traffic)
        lines.append(f"| {layout.name} | {' | '.join(f'{figure / GB:,.1f}' for figure in figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--preset", default="mythos_100b")
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--per-node", type=int, default=8, help="ranks of a node")
    for name in ("seq_len", "sequences", "loops", "learned"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Work, name))
    asked = parser.parse_args()
    config = preset(asked.preset)
    work = Work(asked.seq_len, asked.sequences, asked.loops, asked.learned)
    counts = parameter_counts(config)
    print(
        f"{asked.preset}: {counts.total / 1e9:.1f}B parameters, {counts.recurrent / 1e9:.1f}B of them looped, "
        f"{counts.active / 1e9:.1f}B active per token; {asked.nodes} x {asked.per_node} ranks, "
        f"{work.tokens} tokens per rank and step, {work.loops} loops, the last {work.learned} with gradients; "
        f"{compute_flops(config, work) / 1e12:,.0f} TFLOP per rank and step; GB per rank:\n"
    )
    print(table(config, work, layouts(asked.nodes, asked.per_node)))


if __name__ == "__main__":
    main()
