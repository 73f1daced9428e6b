"""Measures this machine and writes what a virtual cluster needs: `python -m pympa.calibrate`."""
