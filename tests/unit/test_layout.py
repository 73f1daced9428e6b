"""Splits lose nothing, double nothing and balance."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pympa.plan.accounting import visible_pairs
from pympa.plan.layout import (
    Layout,
    Range,
    split,
    split_batch,
    split_micro_batches,
    split_tokens,
    streams_tokens,
)

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6)
balances = st.sampled_from(["zigzag", "contiguous"])


@given(st.integers(0, 100), st.integers(1, 20))
def test_split(total, parts):
    pieces = split(total, parts)
    assert [i for a, b in pieces for i in range(a, b)] == list(range(total))
    sizes = [b - a for a, b in pieces]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(lengths, st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), balances)
def test_every_token_is_in_one_place(lengths, dp, micro_batches, cp, balance):
    rows = []
    for group in split_batch(lengths, dp):
        for part in split_micro_batches(group, micro_batches):
            for layout in split_tokens(part, cp, balance):
                assert all(r.length > 0 for r in layout.ranges)
                rows += layout.global_rows(lengths).tolist()
    assert sorted(rows) == list(range(sum(lengths)))


@given(lengths, st.integers(1, 9))
def test_micro_batches_cut_sequences_only_if_they_must(lengths, parts):
    whole = split_batch(lengths, 1)[0]
    pieces = split_micro_batches(whole, parts)
    cut = any(r.length != lengths[r.sequence] for piece in pieces for r in piece.ranges)
    assert not cut or streams_tokens(whole, parts)
    joined = Layout(())
    for piece in pieces:
        joined = joined.then(piece)
    assert joined == whole


@given(lengths, st.data())
def test_slice(lengths, data):
    layout = split_batch(lengths, 1)[0]
    start = data.draw(st.integers(0, layout.rows))
    stop = data.draw(st.integers(start, layout.rows))
    part = layout.slice(start, stop)
    assert part.global_rows(lengths).tolist() == list(range(sum(lengths)))[start:stop]


@given(lengths, st.integers(1, 5), balances)
def test_sequence_ends(lengths, cp, balance):
    found = []
    for layout in split_tokens(split_batch(lengths, 1)[0], cp, balance):
        for sequence, row in layout.sequence_ends(lengths):
            last = layout.global_rows(lengths)[row]
            assert last == sum(lengths[: sequence + 1]) - 1
            found.append(sequence)
    assert sorted(found) == [s for s, n in enumerate(lengths) if n]


def test_zigzag_balances_causal_work():
    whole = Layout((Range(0, 0, 1600),))
    work = {
        balance: [sum(visible_pairs(q, k, causal=True, window=None) for k in ranks) for q in ranks]
        for balance in ("zigzag", "contiguous")
        for ranks in [split_tokens(whole, 8, balance)]
    }
    assert max(work["zigzag"]) / min(work["zigzag"]) < 1.01
    assert max(work["contiguous"]) / min(work["contiguous"]) > 10


ranges = st.lists(
    st.builds(Range, st.integers(0, 1), st.integers(0, 30), st.integers(1, 12)), max_size=3
)


@given(ranges, ranges, st.booleans(), st.one_of(st.none(), st.integers(1, 20)))
def test_visible_pairs_counts_the_mask(q, k, causal, window):
    q, k = Layout(tuple(q)), Layout(tuple(k))
    pairs = 0
    for a in q.ranges:
        for b in k.ranges:
            distance = np.arange(a.start, a.start + a.length)[:, None] - np.arange(
                b.start, b.start + b.length
            )
            seen = np.full(distance.shape, a.sequence == b.sequence)
            seen &= (distance >= 0) | (not causal)
            seen &= (abs(distance) < window) if window else True
            pairs += int(seen.sum())
    assert visible_pairs(q, k, causal, window) == pairs
