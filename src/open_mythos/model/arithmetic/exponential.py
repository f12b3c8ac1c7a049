"""The exponential, in a form that becomes vector instructions.

Main entry: `exp`.
"""

from __future__ import annotations

import numpy as np

from open_mythos.model.arithmetic.compiled import compiled


@compiled
def exp(x: np.float32) -> np.float32:
    """`exp(x)` to about one unit in the last place, from 1e-38 to 2e38, in a form that becomes vector instructions.

    The polynomial is that of Cephes (Moshier 1989), `expf`.
    """
    bounded = min(max(x, np.float32(-87.33654)), np.float32(88.37626))
    whole = np.floor(bounded * np.float32(1.44269504) + np.float32(0.5))
    rest = bounded - whole * np.float32(0.693359375) + whole * np.float32(2.12194440e-4)
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    series = series * rest * rest + rest + np.float32(1)
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return series * power if x == x else x
