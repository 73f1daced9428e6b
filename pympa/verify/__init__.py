"""Verification of a run: the float64 oracle, the limits of errors, and the verdict."""
