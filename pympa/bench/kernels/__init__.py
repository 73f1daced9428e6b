"""Single kernels on one core: checked, then timed."""
