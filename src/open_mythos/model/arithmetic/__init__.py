"""What compiled code is made of: how functions are compiled, and the inner loops that products and norms share.

`compiled` says how and on how many threads; `product` has whole matrices, `tiles` a few rows by a matrix, `exponential`
the exponential. `few_rows` and `many_rows` are built of these.
"""
