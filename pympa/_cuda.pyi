"""CUDA kernels of pympa: the functions of `pympa._core` on GPUs, and a few that only GPUs have."""

from pympa._stubs.attention import *
from pympa._stubs.execution import *
from pympa._stubs.experts import *
from pympa._stubs.linear import *
from pympa._stubs.rows import *

def copy(source: Array, out: Array, on: Execution) -> None:
    """Copy between arrays of the same shape and dtype that do not overlap; rows may be strided."""

def load_gemm(directory: str) -> int:
    """Load cuBLASLt from the process or the system, or from a directory.

    Returns:
        The version of cuBLASLt.

    Raises:
        RuntimeError: cuBLASLt is not found.
    """
