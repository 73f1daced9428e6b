"""CUDA kernels of pympa: the functions of `pympa._core` on GPUs; its stub documents them."""

from pympa._core import Array
from pympa._core import Execution as Execution
from pympa._core import add as add
from pympa._core import attend_block as attend_block
from pympa._core import attention_workspace_bytes as attention_workspace_bytes
from pympa._core import combine_rows as combine_rows
from pympa._core import count_experts as count_experts
from pympa._core import drop_overflow as drop_overflow
from pympa._core import finish as finish
from pympa._core import fold_tile as fold_tile
from pympa._core import gated_linear as gated_linear
from pympa._core import gather_rows as gather_rows
from pympa._core import linear as linear
from pympa._core import linear_workspace_bytes as linear_workspace_bytes
from pympa._core import merge as merge
from pympa._core import norm as norm
from pympa._core import pack_weight as pack_weight
from pympa._core import packed_weight_bytes as packed_weight_bytes
from pympa._core import range_workspace_bytes as range_workspace_bytes
from pympa._core import rope as rope
from pympa._core import score_tile as score_tile
from pympa._core import select_experts as select_experts
from pympa._core import sort_rows as sort_rows
from pympa._core import start_state as start_state
from pympa._core import sum_partials as sum_partials
from pympa._core import supported_isas as supported_isas

def copy(source: Array, out: Array, on: Execution) -> None:
    """Copy between arrays of the same shape and dtype that do not overlap; rows may be strided."""

def load_gemm(directory: str) -> int:
    """Load cuBLASLt from the process or the system, or from a directory.

    Returns:
        The version of cuBLASLt.

    Raises:
        RuntimeError: cuBLASLt is not found.
    """
