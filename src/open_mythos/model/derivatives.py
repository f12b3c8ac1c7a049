"""Which implementation to use when more than a first reverse-mode derivative is wanted.

Main entry: `elementary_only`. Fused kernels have a backward and nothing else: no forward mode, no second derivative.
"""

import torch


def elementary_only() -> bool:
    """True inside `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, PyTorch's own way to ask for plain operations.

    Within that context every part of the model is a composition of elementary operations, so `torch.func.jvp` and
    double backward work; outside it the fused kernels are used. `torch.compile` cannot see that context.
    """
    return not torch.compiler.is_compiling() and not torch.backends.cuda.flash_sdp_enabled()
