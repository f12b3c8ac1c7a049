"""Passes over few positions on a CPU: what stands in for modules there, in code that Numba compiles.

`stand_ins` says where; `block`, `loop` and `token` hold a module's weights; `layers`, `attention`, `feed_forward`,
`products` and `pointwise` compute, on arrays (positions, channels).
"""
