"""Measure this machine and write a profile for `--backend virtual`: `python -m pympa.calibrate`."""
