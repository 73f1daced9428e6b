"""Run the studied systems on this machine: verify, then time.

`python -m pympa.bench` is the main job; `python -m pympa.bench.kernels` times single kernels.
"""
