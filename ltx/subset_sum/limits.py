"""How large a base set the solvers take; apart, so that the command line can check it without loading them."""

MAX_BASE_SET_SIZE = 32  # a subset is a mask of 32 bits, a half has at most 2^15 sums
