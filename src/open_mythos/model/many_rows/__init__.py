"""Layers over many positions in compiled code, forward and backward: what training on a CPU runs.

`stand_ins` says where; `function` is what PyTorch differentiates, `layer` its steps, and the rest what these are made
of. Everything is float32.
"""
