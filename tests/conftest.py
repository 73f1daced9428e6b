"""Fixtures, options and hooks of all tests; what tests import is in `support`.

Under `mpirun ... pytest --with-mpi` only tests marked `mpi` run.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Products of these tests are small, and ranks are more than cores: threads of BLAS would spin and
# wait for each other. This is before anything imports NumPy, and holds for the jobs of tests too.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
pytest.register_assert_rewrite("support")  # before anything of it is imported

from support.leftovers import nothing_left_behind  # noqa: E402

# A shared machine may stop for longer than hypothesis would allow an example.
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")

# A shell starts a program in the background with Ctrl-C ignored, and its children inherit that.
# Here Ctrl-C has its usual effect again, for the tests that send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


MOST_WORKERS = 4  # one of them runs what starts jobs, and takes as long as three with the rest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pympa")
    group.addoption(
        "--full",
        action="store_true",
        help="run everything, not the fast lane: all instruction sets, all numbers of ranks, all "
        "samples of plans; before a change is proposed, as .ci/run does",
    )
    group.addoption(
        "--all-plans",
        action="store_true",
        help="besides all of --full, run every plan and every random draw, not samples of them; "
        "for a change of strategies, as: pytest tests/parallel/test_plans.py --all-plans",
    )
    group.addoption("--gpu", action="store_true", help="run tests/gpu on a GPU, or fail")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: runs with --full only, as the fast lane has others")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let workers of pytest-xdist run the whole suite; a part of it runs in this process."""
    if "PYTEST_XDIST_WORKER" in os.environ or getattr(config.option, "numprocesses", 0) is not None:
        return  # a worker itself, or decided by -n, or pytest-xdist is not here
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    if whole and not (config.option.usepdb or _with_mpi(config)):
        config.option.numprocesses = min(len(os.sched_getaffinity(0)), MOST_WORKERS)


@pytest.fixture
def all_plans(request: pytest.FixtureRequest) -> bool:
    """Tell whether every plan and every draw is wanted, which takes ten minutes more."""
    return bool(request.config.getoption("--all-plans"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the MPI part to test_mpirun.py: importing it would make this process an MPI rank."""
    return True if collection_path.name == "mpi" and not _with_mpi(config) else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what is in a folder `mpi`, so that no file there can forget it and never run."""
    if item.path.parent.name == "mpi":
        item.add_marker("mpi")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one worker of several (`-n 2`) run all tests that start jobs."""
    from support.workers import JobsOnOneWorker

    return JobsOnOneWorker(config, log)


def _with_mpi(config: pytest.Config) -> bool:
    return bool(config.getoption("--with-mpi", default=False))


@pytest.fixture(scope="session")
def full_lane(pytestconfig: pytest.Config) -> bool:
    """Tell whether everything is wanted, for jobs that choose their lane themselves."""
    return _full(pytestconfig)


def _full(config: pytest.Config) -> bool:
    return any(config.getoption(option) for option in ("--full", "--all-plans", "--gpu"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _full(config):
        _deselect(config, items, lambda item: item.get_closest_marker("full") is not None)
    if _with_mpi(config):
        from mpi4py import MPI

        if MPI.COMM_WORLD.Get_size() > 1:
            _deselect(config, items, lambda item: item.get_closest_marker("mpi") is None)


def _deselect(
    config: pytest.Config, items: list[pytest.Item], unwanted: Callable[[pytest.Item], bool]
) -> None:
    out = [item for item in items if unwanted(item)]
    items[:] = [item for item in items if not unwanted(item)]
    config.hook.pytest_deselected(items=out)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """A test with it leaves no file in /dev/shm and no process of this suite's jobs."""
    with nothing_left_behind():
        yield
