"""Kernels of pympa (C++ and CUDA, pybind11).

Rules for every function:

- `pympa._core` has the functions for CPUs and `pympa._cuda` those for GPUs, with the same
  arguments: `pympa/_stubs` documents them. `mlp` and the measurements of a core are only in
  `_core`. Arrays are NumPy arrays in `_core` and CuPy arrays in `_cuda`, but ranges, head maps,
  counts and `group_rows` are NumPy arrays in both. GPU kernels run later, in the order of their
  stream; functions that return a value or fill in counts wait for them.
- Arrays are of float32, float16 or `ml_dtypes.bfloat16` ("dtype" below) unless a
  type is given. Sums are float32; results are rounded to nearest, ties to even.
- Shapes are written `[rows, columns]`. The last dimension is contiguous; the other dimensions may
  be strided unless the text says otherwise.
- The caller allocates outputs and workspaces; a kernel allocates nothing. Workspaces are flat
  uint8 arrays with any contents, at least as long as the `*_workspace_bytes` function returns.
- `on` is the execution resource. Results have the same bits on every call with the same `isa`; they
  do not depend on `threads`, the number of OpenMP threads (1: no parallel region).
- The GIL is released while a kernel runs.
- A wrong shape, dtype, name, workspace or ISA raises ValueError: argument, expected, got.
"""

from pympa._stubs.attention import *
from pympa._stubs.execution import *
from pympa._stubs.experts import *
from pympa._stubs.linear import *
from pympa._stubs.rows import *

def mlp_workspace_bytes(
    item_rows: int, hidden: int, n: int, dtype: str, gated: bool, on: Execution
) -> int:
    """Return the workspace bytes of `mlp`, which do not depend on the number of rows."""

def mlp(
    x: Array,
    packed_gate: Bytes | None,
    packed_up: Bytes,
    packed_down: Bytes,
    out: Array,
    bias_gate: Array | None,
    bias_up: Array | None,
    bias: Array | None,
    activation: str,
    limit: float,
    alpha: float,
    hidden: int,
    residual: Array | None,
    branch: Array | None,
    group_rows: Int64 | None,
    item_rows: int,
    workspace: Bytes,
    on: Execution,
) -> None:
    """Compute `linear`, or `gated_linear`, and a second `linear`, with the bits of both calls.

    Only parts of `[item_rows, 512]` of the hidden state exist at a time.

    Args:
        x: the inputs `[m, k]`.
        packed_gate: the packed `[hidden, k]` weight of a gated MLP, or None.
        packed_up: the packed `[hidden, k]` weight.
        packed_down: the packed `[n, hidden]` weight.
        out: an output `[m, n]` of x's dtype, or float32; may be `residual` or x.
        bias_gate: the bias `[hidden]` of x's dtype.
        bias_up: the bias `[hidden]` of x's dtype.
        bias: the bias `[n]` of x's dtype.
        activation: the function, see `linear`; with a gate, see `gated_linear`.
        limit: see `gated_linear`.
        alpha: see `gated_linear`.
        hidden: the number of columns of the hidden state.
        residual: the residual, see `linear`.
        branch: an output, see `linear`.
        group_rows: the rows of each group, see `linear`; weights are then `[groups, bytes]`, biases
            `[groups, columns]`.
        item_rows: the number of rows for which one thread reads the weights once; it changes memory
            and speed.
        workspace: the workspace, see `mlp_workspace_bytes`.
        on: the execution resource.
    """

def product_peak(dtype: str, isa: str, seconds: float) -> float:
    """Measure the flop/s of one core in registers, by the instruction that products of a dtype use.

    For a dtype that is split into pieces, they are the flop/s of all the products of pieces
    together.
    """

def read_bandwidth(bytes: int, seconds: float, tries: int) -> float:
    """Measure the bytes/s of one core over a buffer of `bytes` bytes: the best of some tries."""
