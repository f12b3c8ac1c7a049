"""Layers over many positions in compiled code, forward and backward: what training on a CPU runs.

Main entry: `many_rows.layers`. Everything is float32.
"""
