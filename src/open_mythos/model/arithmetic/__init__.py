"""What compiled code is made of: how functions are compiled, and the inner loops that products and norms share.

`compiled` says how and on how many threads; `product` has whole matrices, `tiles` a few rows by a matrix, `vectors`
norms and rotations of single rows, `exponential` the exponential, and `addresses` what lies at one. `few_rows` and
`many_rows` are built of these.
"""
