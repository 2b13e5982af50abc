"""The errors that a user can cause, so that the command line can tell them from bugs."""


class LtxError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


class ConstructionError(LtxError):
    """A ticket cannot be constructed with these settings (no subset within epsilon, unsupported module)."""


class UnsolvedError(ConstructionError):
    """The source has run out of rows: the ticket is not there for this seed, m and epsilon."""


class CheckpointError(LtxError):
    """A target or ticket file is missing, damaged, or belongs to something else."""


class DataError(LtxError):
    """A data set is neither there nor reachable, or its files are damaged."""
