"""Runs the main job on an emulated GPU for each rank; see test_cuda.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pympa import _cuda_emulated
from pympa.bench import __main__ as command
from pympa.kernels import peaks as machine
from pympa.kernels.cuda import Accelerator
from pympa.session import opening
from support.emulated import EmulatedCore, EmulatedDevice


def open_emulated(local_index: int, *, timeout_seconds: float) -> Accelerator:
    """Let two ranks share a GPU."""
    device = EmulatedDevice(
        timeout_seconds=timeout_seconds, bus_id=f"0000:0{local_index // 2}:00.0", capacity=4 << 30
    )
    return Accelerator(device, EmulatedCore(_cuda_emulated, device))


if __name__ == "__main__":
    opening.open_accelerator = open_emulated
    machine._DEVICE_PRODUCT, machine._DEVICE_COPY = 32, (64, 64)
    sys.exit(command.main(sys.argv[1:]))
