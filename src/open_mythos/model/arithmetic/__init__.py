"""What compiled code is made of: how functions are compiled, and the inner loops that products and norms share.

`compiled` says how and on how many threads; `product` has whole matrices, `tiles` a few rows by a matrix, `seen` a
few queries by the rows that a list names; these three speak LLVM's own terms, which are in `registers`. `vectors` has
norms, rotations, copies and sums of single rows, `exponential` the exponential, and `addresses` what lies at one.
`few_rows` and `many_rows` are built of these.
"""
