"""Records: one JSON line for each plan, written, read and compared."""
