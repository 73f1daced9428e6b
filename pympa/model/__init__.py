"""A transformer on one rank: its layers, weights, batch, and keys and values."""
