"""How many chains of hops a problem holds.

Main entry: `n_chains`.
"""

from __future__ import annotations


def n_chains(hops: int, names: int, names_each: int) -> int:
    """As many as there are names for, but few for few hops: the less there is, the sooner a look-up is learned.

    At least two, as all hops of a single chain lead to the same end; `ValueError` if there are too few names for that.
    A chain takes `names_each`, one of them for every hop.
    """
    if names < 2 * names_each:
        most = names // 2 - (names_each - hops)
        raise ValueError(f"length is {hops}; it must be at most {most}, for two chains with {names} names")
    return min(hops + 1, names // names_each)
