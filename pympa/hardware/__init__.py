"""The hardware of a rank: caches, cores, memory, and a GPU."""
