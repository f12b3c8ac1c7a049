"""Small models whose every part has weights that matter."""

import torch

from open_mythos.config import MythosConfig
from open_mythos.model.mythos import OpenMythos


def lively_model(config: MythosConfig, seed: int = 0, scale: float = 0.3) -> OpenMythos:
    """A model with random values in all parameters, also in those that start as zeros or ones."""
    torch.manual_seed(seed)
    model = OpenMythos(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def halting_model(config: MythosConfig, seed: int = 0) -> OpenMythos:
    """A model whose positions halt at different loops, most of them early."""
    torch.manual_seed(seed)
    model = OpenMythos(config).eval()
    act = model.recurrent.act
    assert act is not None
    with torch.no_grad():
        act.halt.weight.normal_(std=0.3)
        act.halt.bias.fill_(-1.0)
    return model


def random_ids(config: MythosConfig, batch: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(seed))
