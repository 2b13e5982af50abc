"""How large a base set the solvers take; apart, so that the command line can check it without loading them."""

MAX_BASE_SET_SIZE = 24  # the exhaustive search of a problem without a solution looks at 2^m subsets
