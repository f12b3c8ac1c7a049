"""Initial weights.

Main entry: `init_weights`. Standard deviations follow Takase et al. 2023 (arXiv 2312.16903), as in Huginn and Parcae.
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
    """Fill every weight.

    What reads the stream gets `sqrt(2 / (5 dim))`, what writes to it less by the square root of twice the depth. Inside
    a block all are divided by its `branch_scale`, which the norms' gains make up for.
    """
    std = (0.4 / config.dim) ** 0.5
    depth = config.prelude_layers + config.recurrent_layers * config.max_loop_iters + config.coda_layers
    nn.init.normal_(model.get_parameter("embed.weight"), std=config.dim**-0.5)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _fill(module.weight, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Block):
            _init_block(module, std, std / (2 * depth) ** 0.5)
        elif isinstance(module, DepthAdapter):
            nn.init.zeros_(module.up.weight)
        elif isinstance(module, ACTHalting):
            nn.init.zeros_(module.halt.weight)
            nn.init.constant_(module.halt.bias, math.log(_FIRST_HALTING_PROBABILITY / (1 - _FIRST_HALTING_PROBABILITY)))


def _init_block(block: Block, std_in: float, std_out: float) -> None:
    scale = block.branch_scale
    for name, weight in block.named_parameters():
        if weight.dim() < 2 or name == "attn.qk_gain":
            continue
        writes_to_stream = name in ("attn.out.weight", "ffn.down", "ffn.down.weight", "ffn.shared.down.weight")
        _fill(weight, (std_out if writes_to_stream else std_in) / scale)
    for module in block.modules():
        if isinstance(module, RMSNorm):
            nn.init.constant_(module.weight, scale)


def _fill(weight: Tensor, std: float) -> None:
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
