"""Resources of a rank for any computation: memory, loops, clocks, traces, counts of bytes."""
