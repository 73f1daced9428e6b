"""Simulated plans: `--backend virtual`."""
