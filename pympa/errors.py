"""The error that every rank raises together. Imports nothing, so that command lines start fast."""


class RefusedError(ValueError):
    """All ranks agree that a request cannot be done; the message says why and what would."""
