"""Wrong arguments of routing raise ValueError; see test_errors.py."""

import numpy as np
import pytest

from pympa import _core

ON = _core.Execution(_core.supported_isas()[0])
F32 = np.float32


def ids(*rows):
    return np.array(rows, np.int32)


def counts(*values):
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("logits", "experts", "message"),
    [
        (np.ones((2, 3)), ids([0], [0]), r"logits: expected dtype .*, got float64"),
        (np.ones((2, 3), np.float16), ids([0], [0]), r"logits: expected dtype float32, got float1"),
        (np.ones((2, 3), F32), ids([0]), r"experts: expected shape \[2, any\], got \[1, 1\]"),
        (np.ones((1, 3), F32), ids([0, 0, 0, 0]), r"experts: expected 1 to 3 columns, got 4"),
        (np.ones((1, 3), F32), np.empty((1, 0), np.int32), r"experts: expected 1 to 3 .*, got 0"),
        (np.ones((2, 3), F32), ids([0], [0]), r"weights: expected shape \[2, 1\], got \[3, 1\]"),
    ],
)
def test_select_experts(logits, experts, message):
    with pytest.raises(ValueError, match="select_experts: " + message):
        _core.select_experts(
            logits, experts, np.ones((3, 1), F32), True, "softmax", 1, 1, "largest", 1.0, None, ON
        )


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("score", "relu", r"score: expected softmax or sigmoid, got 'relu'"),
        ("groups", 0, r"groups: expected a divisor of 8 \(columns of logits\), got 0"),
        ("groups", 3, r"groups: expected a divisor of 8 \(columns of logits\), got 3"),
        ("groups", -2, r"groups: expected a divisor of 8 \(columns of logits\), got -2"),
        ("top_groups", 0, r"top_groups: expected 1 to 4 \(groups\), got 0"),
        ("top_groups", 5, r"top_groups: expected 1 to 4 \(groups\), got 5"),
        ("top_groups", 1, r"experts: expected 1 to 2 columns, got 3"),
        ("group_score", "sum", r"group_score: expected largest or top2, got 'sum'"),
        ("scale", 0.0, r"scale: expected a number from 1\.17549e-38 to 1e\+30, got 0"),
        ("scale", np.nan, r"scale: expected a number from .*, got nan"),
        ("choice_bias", np.ones(8), r"choice_bias: expected dtype .*, got float64"),
        ("choice_bias", np.ones(8, np.float16), r"choice_bias: expected dtype float32, got float1"),
        ("choice_bias", np.ones(7, F32), r"choice_bias: expected shape \[8\], got \[7\]"),
    ],
)
def test_routing_rules(argument, value, message):
    arguments = {
        "logits": np.ones((2, 8), F32),
        "experts": np.zeros((2, 3), np.int32),
        "weights": np.ones((2, 3), F32),
        "renormalize": True,
        "score": "sigmoid",
        "groups": 4,
        "top_groups": 2,
        "group_score": "top2",
        "scale": 2.5,
        "choice_bias": np.ones(8, F32),
        "on": ON,
    }
    assert _core.select_experts(**arguments) == -1
    with pytest.raises(ValueError, match="select_experts: " + message):
        _core.select_experts(**arguments | {argument: value})


def test_groups_of_one_and_many_experts():
    def select(count, groups, score, group_score):
        outputs = np.zeros((1, 1), np.int32), np.zeros((1, 1), F32)
        logits = np.ones((1, count), F32)
        rule = (score, groups, groups, group_score, 1.0, None)
        return _core.select_experts(logits, *outputs, False, *rule, ON)

    with pytest.raises(ValueError, match=r"group_score: expected largest with groups of one exp"):
        select(8, 8, "softmax", "top2")
    assert select(2048, 1, "sigmoid", "largest") == -1
    with pytest.raises(ValueError, match=r"logits: expected at most 2048 columns with this rout"):
        select(2049, 1, "sigmoid", "largest")
    assert select(5000, 1, "softmax", "largest") == -1


def test_routing():
    pair, three = ids([0, 2], [1, -1]), counts(0, 0, 0)
    with pytest.raises(ValueError, match=r"sort_rows: experts: .* in \[-1, 2\), got 2 in row 0"):
        _core.sort_rows(pair, counts(0, 0), ids(0, 0, 0, 0), pair.copy(), ON)
    with pytest.raises(ValueError, match=r"experts: expected entries .*, got -2 in row 1"):
        _core.sort_rows(ids([0], [-2]), three, ids(0, 0), ids([0], [0]), ON)
    with pytest.raises(ValueError, match=r"sort_rows: sources: expected shape \[4\], got \[3\]"):
        _core.sort_rows(pair, three, ids(0, 0, 0), pair.copy(), ON)
    with pytest.raises(ValueError, match=r"count_experts: segment_rows: .* 2 rows, got 1 too few"):
        _core.count_experts(pair, counts(1), three[None], ON)
    with pytest.raises(ValueError, match=r"count_experts: counts: expected shape \[2, any\]"):
        _core.count_experts(pair, counts(1, 1), three[None], ON)
    with pytest.raises(ValueError, match=r"drop_overflow: capacity: expected shape \[1\]"):
        _core.drop_overflow(pair, counts(2), three[None], counts(1, 1), ON)
    with pytest.raises(ValueError, match=r"drop_overflow: used: expected a writeable array"):
        _core.drop_overflow(pair, counts(2), np.broadcast_to(three, (1, 3)), counts(1), ON)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (
            "inverse",
            ids([0, 3], [1, -1]),
            r"inverse: expected entries in \[-1, 3\), got 3 in row 0",
        ),
        (
            "inverse",
            ids([0, 1], [1, -2]),
            r"inverse: expected entries in \[-1, 3\), got -2 in row 1",
        ),
        ("weights", np.ones((2, 3), F32), r"weights: expected shape \[2, 2\], got \[2, 3\]"),
        ("weights", np.ones((2, 2), np.float16), r"weights: expected dtype float32, got float16"),
        ("base", np.ones((2, 5), F32), r"base: expected shape \[2, 4\], got \[2, 5\]"),
        ("base", None, r"base_gate: expected None without base, got an array"),
        ("base_gate", np.ones((2, 2), F32), r"base_gate: expected shape \[2, 1\], got \[2, 2\]"),
        ("base_gate", np.ones((2, 1), np.float16), r"base_gate: expected dtype float32, got float"),
        ("out", np.ones((2, 4), np.float16), r"out: expected dtype float32, got float16"),
    ],
)
def test_combine_rows(argument, value, message):
    arguments = {
        "rows": np.ones((3, 4), F32),
        "inverse": ids([0, 2], [1, -1]),
        "weights": np.ones((2, 2), F32),
        "base": np.ones((2, 4), F32),
        "base_gate": np.ones((2, 1), F32),
        "out": np.ones((2, 4), F32),
        "on": ON,
    }
    _core.combine_rows(**arguments)
    with pytest.raises(ValueError, match="combine_rows: " + message):
        _core.combine_rows(**arguments | {argument: value})
