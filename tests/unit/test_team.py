"""How many cores ranks have, the threads that fill them, and what they are called."""

import platform
from pathlib import Path

import pytest

from pympa.hardware.cores import Placement, count_processors, even_threads, processor_name


@pytest.mark.parametrize(
    ("places", "threads"),
    [
        ([("a", {0, 1})], 2),
        ([("a", {0, 1})] * 16, 1),
        ([("a", set(range(96)))] * 8, 12),
        ([("a", set(range(96)))] * 7, 13),
        ([("a", {0, 1, 2, 3}), ("a", {4, 5, 6, 7})], 4),
        ([("a", {0, 1, 2, 3}), ("a", {4, 5})], 2),
        ([("a", {0}), ("a", set(range(8)))], 1),
        ([("a", set(range(8)))] * 2 + [("b", set(range(64)))] * 2, 4),
    ],
    ids=["one", "shared", "whole node", "uneven", "pinned", "unequal", "one pinned", "two nodes"],
)
def test_threads_fill_the_cores_and_no_more(places, threads):
    places = [Placement(node, frozenset(cores)) for node, cores in places]
    assert even_threads(places) == threads
    if threads > 1:
        assert not count_processors(places, threads)[1]
        assert (
            count_processors(places, threads + 1)[1] or len({len(cores) for _, cores in places}) > 1
        )


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: A CPU @ 2.5: GHz\nmodel name\t: B\n", "A CPU @ 2.5: GHz"),
        ("processor\t: 0\nCPU part\t: 0xd40\n", platform.machine()),
        (None, platform.machine()),
    ],
    ids=["first", "none", "no file"],
)
def test_a_processor_is_called_what_linux_calls_it(cpuinfo, name, monkeypatch):
    exists, read = Path.exists, Path.read_text
    mine = Path("/proc/cpuinfo")
    monkeypatch.setattr(Path, "exists", lambda p: cpuinfo is not None if p == mine else exists(p))
    monkeypatch.setattr(Path, "read_text", lambda p, *a: cpuinfo if p == mine else read(p, *a))
    assert processor_name() == name
