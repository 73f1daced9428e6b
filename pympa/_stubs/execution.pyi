"""Arrays of kernels, and the instruction set, threads or stream that kernels run on."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Bytes: TypeAlias = NDArray[np.uint8]
Float32: TypeAlias = NDArray[np.float32]
Int32: TypeAlias = NDArray[np.int32]
Int64: TypeAlias = NDArray[np.int64]

def supported_isas() -> list[str]:
    """Return what this machine runs, best first; `["cuda"]` of the kernels for GPUs.

    The order comes from a table of processors. `amx_emulated` is last: the kernels of `amx_bf16`
    over a model of its instructions, for tests.
    """

def why_no_tiles() -> str:
    """Return why the matrix tiles (AMX) of this processor are not used; empty if it has none."""

class Execution:
    """The instruction set, threads or stream that kernels run on.

    Args:
        isa: one of `supported_isas()`.
        threads: the number of OpenMP threads of a call on a CPU.
        stream: the `cudaStream_t` of a GPU, as a number; 0 is its default stream.
    """

    def __init__(self, isa: str, *, threads: int = 1, stream: int = 0) -> None: ...
