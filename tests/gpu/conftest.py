"""Tests of CUDA kernels: on a GPU where there is one, and on the emulation where it was built.

`python -m pytest tests/gpu --gpu` runs the first alone, and fails where there is no GPU.
"""

from __future__ import annotations

import hypothesis
import pytest

from support.rig import Rig, device_rig

ON_GPU, EMULATED = 80, 25
"""Examples of a test: the emulation is slow."""


def pytest_configure(config: pytest.Config) -> None:
    # A failure on a GPU should be told within the time there is, and not be made smaller.
    hypothesis.settings.register_profile(
        "devices",
        max_examples=ON_GPU if config.getoption("--gpu") else EMULATED,
        derandomize=not config.getoption("--gpu"),
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu"):
        emulated = [item for item in items if "[emulated" in item.name]
        items[:] = [item for item in items if "[emulated" not in item.name]
        config.hook.pytest_deselected(items=emulated)


@pytest.fixture(scope="session", params=["gpu", "emulated"])
def rig(request: pytest.FixtureRequest) -> Rig:
    found = device_rig(request.param)
    if isinstance(found, str) and request.config.getoption("--gpu"):
        pytest.fail(found)
    if isinstance(found, str):
        pytest.skip(found)
    return found
