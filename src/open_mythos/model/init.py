"""Initial weights.

Main entry: `init_weights`. Standard deviations follow Takase et al. 2023 (arXiv 2312.16903), as in Huginn and Parcae.
"""

from __future__ import annotations

import torch
from torch import nn

from open_mythos.config import MythosConfig
from open_mythos.model.depth_adapter import DepthAdapter
from open_mythos.model.experts import MoEFFN
from open_mythos.model.halting import ACTHalting

# Halting probability of an untrained model, small enough that no position stops within 24 loops.
_FIRST_HALTING_PROBABILITY = 0.04


@torch.no_grad()
def init_weights(model: nn.Module, config: MythosConfig) -> None:
    """Fill every weight: `sqrt(2 / (5 dim))` for what reads the stream, less by depth for what writes to it."""
    std = (0.4 / config.dim) ** 0.5
    depth = config.prelude_layers + config.recurrent_layers * config.max_loop_iters + config.coda_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            writes_to_stream = name.endswith(("attn.out", ".down")) 
            nn.init.trunc_normal_(module.weight, std=std / (2 * depth) ** 0.5 if writes_to_stream else std, a=-1, b=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=config.dim**-0.5)
        elif isinstance(module, MoEFFN):
            nn.init.trunc_normal_(module.gate, std=std, a=-1, b=1)
            nn.init.trunc_normal_(module.up, std=std, a=-1, b=1)
            nn.init.trunc_normal_(module.down, std=std / (2 * depth) ** 0.5, a=-1, b=1)
    for module in model.modules():
        if isinstance(module, DepthAdapter):
            nn.init.zeros_(module.up.weight)
        elif isinstance(module, ACTHalting):
            nn.init.zeros_(module.halt.weight)
            p = torch.tensor(_FIRST_HALTING_PROBABILITY)
            nn.init.constant_(module.halt.bias, float(torch.logit(p)))
