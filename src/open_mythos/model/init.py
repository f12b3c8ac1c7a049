"""Initial weights.

Main entry: `init_weights`. The standard deviation is Takase et al.'s (2023, arXiv 2312.16903), as in Huginn and Parcae,
without their scaling by depth.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from open_mythos.config import MythosConfig
from open_mythos.model.block import Block
from open_mythos.model.depth_adapter import DepthAdapter
from open_mythos.model.halting import ACTHalting
from open_mythos.model.norm import RMSNorm

# Halting probability of an untrained model: its output is the last state, give or take a thousandth per loop.
_FIRST_HALTING_PROBABILITY = 0.001


@torch.no_grad()
def init_weights(model: nn.Module, config: MythosConfig) -> None:
    """Fill every weight: `sqrt(2 / (5 dim))` for the matrices, divided inside a block by its `branch_scale`.

    The blocks' gains make up for that division. What writes to the stream is not made smaller by depth: the decay A
    already keeps the sum over loops bounded, and smaller starts learned markedly slower.
    """
    std = (0.4 / config.dim) ** 0.5
    nn.init.normal_(model.get_parameter("embed.weight"), std=config.dim**-0.5)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _fill(module.weight, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Block):
            _init_block(module, std)
        elif isinstance(module, DepthAdapter):
            nn.init.zeros_(module.up.weight)
        elif isinstance(module, ACTHalting):
            nn.init.zeros_(module.halt.weight)
            nn.init.constant_(module.halt.bias, math.log(_FIRST_HALTING_PROBABILITY / (1 - _FIRST_HALTING_PROBABILITY)))


def _init_block(block: Block, std: float) -> None:
    for name, weight in block.named_parameters():
        if weight.dim() >= 2 and name != "attn.qk_gain":
            _fill(weight, std / block.branch_scale)
    for module in block.modules():
        if isinstance(module, RMSNorm):
            nn.init.constant_(module.weight, block.branch_scale)


def _fill(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
