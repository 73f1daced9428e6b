"""Experiments as data: a model, a batch, and the plans of a table."""
