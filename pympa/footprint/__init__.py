"""The memory that a plan needs, found by running it on shapes: by rank, layer, working set."""
