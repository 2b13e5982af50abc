"""How much the solvers take; apart, so that the command line can check it without loading them."""

MAX_BASE_SET_SIZE = 32  # a subset is a mask of 32 bits; a half has at most 2^15 sums
MAX_PROBLEMS = 10**8  # of a sample: 9 bytes of each are kept
