"""Layers over many positions in compiled code, forward and backward: what training on a CPU runs.

`stand_ins` says where; `function` is what PyTorch differentiates, `plan` how its memory is laid out, `stage` what it
runs: the steps of `layer` and what is `around`. The rest is what these are made of. Everything is float32.
"""
