"""Runs the main job on an emulated GPU for each rank; see test_cuda.py."""

import sys

from emulated import EmulatedCore, EmulatedDevice
from pympa import _cuda_emulated, session
from pympa.bench import __main__ as command
from pympa.bench import machine
from pympa.kernels.cuda import Accelerator


def open_emulated(local_index: int, *, timeout_seconds: float) -> Accelerator:
    """Let two ranks share a GPU."""
    device = EmulatedDevice(
        timeout_seconds=timeout_seconds, bus_id=f"0000:0{local_index // 2}:00.0", capacity=4 << 30
    )
    return Accelerator(device, EmulatedCore(_cuda_emulated, device))


if __name__ == "__main__":
    session.open_accelerator = open_emulated
    machine._DEVICE_PRODUCT, machine._DEVICE_COPY = 32, (64, 64)
    sys.exit(command.main(sys.argv[1:]))
