"""How many cores ranks have, and the threads that fill them."""

import pytest

from pympa.team import count_processors, even_threads


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
    assert even_threads(places) == threads
    if threads > 1:
        assert not count_processors(places, threads)[1]
        assert (
            count_processors(places, threads + 1)[1] or len({len(cores) for _, cores in places}) > 1
        )
