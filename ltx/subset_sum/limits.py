"""What is known of subset sums in numbers; apart, so that the command line need not load the solvers for it."""

MAX_BASE_SET_SIZE = 32  # a subset is a mask of 32 bits; a half has at most 2^15 sums
MAX_PROBLEMS = 10**8  # of a sample: 9 bytes of each are kept
# C of Corollary 2.2 for theta = 1, the hardest, for uniform base sets and for products of two: above its largest values
# in `python scripts/constants.py`, 3.73 at m = 6 and 7.00 at m = 8 (seed 0, a million problems for each m up to 20)
UNIFORM, PRODUCT = 3.8, 7.1
