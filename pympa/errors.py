"""The error that all ranks raise together. Imports nothing, so that command lines start fast."""


class RefusedError(ValueError):
    """All ranks refuse a request; the message says what was expected, given, and what to do."""
