"""Rigs of all instruction sets, of the best one, and of the GPU's kernels as interpreted."""

from __future__ import annotations

import numpy as np
import pytest

from pympa import _core
from pympa.spec import DTYPES
from support.lanes import lanes
from support.rig import BEST_ISA, Rig, cpu_rig, interpreted_rig

ISAS = _core.supported_isas()


@pytest.fixture(params=lanes(ISAS, [0]), scope="session")
def cpu_kernels(request: pytest.FixtureRequest) -> Rig:
    return cpu_rig(request.param)


@pytest.fixture(scope="session")
def kernels(cpu_kernels: Rig) -> Rig:
    return cpu_kernels


@pytest.fixture(scope="session")
def cuda_kernels() -> Rig:
    """Return the GPU's kernels as an interpreter of CUDA runs them on the CPU."""
    found = interpreted_rig()
    return found if isinstance(found, Rig) else pytest.skip(found)


@pytest.fixture(params=lanes([*ISAS, "cuda"], [0]), scope="session")
def all_kernels(request: pytest.FixtureRequest) -> Rig:
    """Return the CPU's kernels by ISA, and the GPU's."""
    if request.param == "cuda":
        return request.getfixturevalue("cuda_kernels")
    return cpu_rig(request.param)


@pytest.fixture
def attention_kernels(all_kernels: Rig, request: pytest.FixtureRequest) -> Rig:
    """Return what `all_kernels` does, for the dtypes that attention takes there."""
    dtype = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else None
    if all_kernels.isa == "cuda" and dtype == np.float32:
        pytest.skip("attention on a GPU takes 16-bit floats")
    return all_kernels


@pytest.fixture(scope="session")
def best_kernels() -> Rig:
    return cpu_rig(BEST_ISA)


@pytest.fixture(params=list(DTYPES), scope="session")
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    return DTYPES[request.param]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20250711)
