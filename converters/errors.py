"""Errors about checkpoint files.  Every one of them says what was given, what was expected, what to do."""


class CheckpointError(Exception):
    """A checkpoint cannot be used: missing, damaged, of another model, or incomplete."""


class CoverageError(CheckpointError):
    """Source tensors and targets do not match one to one; lists every missing, extra and misshapen tensor."""
