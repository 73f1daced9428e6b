"""The table of ops names every kernel, and what it runs is what it names."""

import numpy as np
import pytest

from pympa import _core
from pympa.kernels.ops import OPS, extent
from pympa.kernels.rig import Rig
from pympa.spec import DTYPES
from support.rig import BEST_ISA

NO_KERNELS = {"Execution", "supported_isas", "why_no_tiles", "product_peak", "read_bandwidth"}
WORKLOADS = [(op.name, workload) for op in OPS for workload in op.workloads]


def test_every_kernel_is_in_the_table():
    functions = {name for name in dir(_core) if not name.startswith("_")}
    sizes = {name for name in functions if name.endswith("_bytes")}
    # A copy on a CPU is NumPy's.
    assert {op.name for op in OPS} - {"copy"} == functions - sizes - NO_KERNELS
    assert len({op.name for op in OPS}) == len(OPS)


@pytest.mark.parametrize(("name", "workload"), WORKLOADS, ids=[w.curve for _, w in WORKLOADS])
def test_a_workload_runs_its_kernel(name, workload):
    rig = Rig(DTYPES["float32"], isa=BEST_ISA)
    smallest = [sizes[0] for sizes in workload.sizes]
    call = workload.make(rig, *smallest)
    with rig.trace.step():
        call()
    assert [span.name for span in rig.trace.last.spans] == [name]


def test_extents_count_rows_and_their_bytes():
    x = np.zeros((7, 10), np.float32)
    assert extent("add", {"a": x, "b": x, "out": x}) == (7, 120)
    assert extent("norm", {"x": x, "out": x, "weight": x[0]}) == (7, 80)
    assert extent("softcap", {"x": x, "cap": 30.0}) == (7, 80)
    assert extent("sum_squares", {"x": x, "out": x[:, :1].copy()}) == (7, 44)
    assert extent("gather_rows", {"source": np.zeros((900, 10)), "out": x}) == (7, 80)
    experts, counts = np.zeros((7, 2), np.int32), np.zeros(5, np.int64)
    assert extent("sort_rows", {"experts": experts, "counts": counts}) == (14, 5)


def test_peaks_are_plausible(kernels):
    for dtype in ("float32", "float16", "bfloat16"):
        least = 1e6 if kernels.isa == "amx_emulated" else 1e8  # a model of instructions is slow
        assert least < _core.product_peak(dtype, kernels.isa, 0.01) < 1e14
    assert 1e7 < _core.read_bandwidth(1 << 20, 0.01, 2) < 1e13
