"""Wrong arguments of kernels that work row by row raise ValueError; see test_errors.py."""

import re

import numpy as np
import pytest

from pympa import _core

ON = _core.Execution(_core.supported_isas()[0])
F32 = np.float32


def test_rope():
    x, cos = np.ones((2, 1, 8), F32), np.ones((4, 4), F32)
    with pytest.raises(ValueError, match=r"index: expected entries in \[0, 4\), got 4 in row 1"):
        _core.rope(x, cos, cos, np.array([0, 4], np.int32), False, ON)
    wide = np.ones((4, 5), F32)
    with pytest.raises(ValueError, match=r"cos: expected at most 4 columns .*, got 5"):
        _core.rope(x, wide, wide, np.zeros(2, np.int32), True, ON)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("kind", "batch", r"kind: expected rms or layer, got 'batch'"),
        *(
            ("eps", eps, r"eps: expected 0 or a number from 1\.17549e-38")
            for eps in (-1.0, 1e-50, 1e-39, 1e39, np.nan)
        ),
        *(
            ("offset", offset, r"abs\(offset\): expected 0 or a number from 1\.17549e-38")
            for offset in (1e-50, -1e31, np.inf, np.nan)
        ),
        ("squares", np.ones((2, 1)), r"squares: expected dtype .*, got float64"),
        ("squares", np.ones((2, 1), np.int32), r"squares: expected dtype float32, got int32"),
        ("squares", np.ones((2, 2), F32), r"squares: expected shape \[2, 1\], got \[2, 2\]"),
        ("squares", np.ones(2, F32), r"squares: expected shape \[2, 1\], got \[2\]"),
        ("width", 2, r"width: expected at least 3, got 2"),
        ("kind", "layer", r"squares: expected None with kind layer.*, got an array"),
    ],
)
def test_norm(argument, value, message):
    arguments = {
        "x": np.ones((2, 3), F32),
        "weight": np.ones(3, F32),
        "bias": None,
        "eps": 1e-5,
        "kind": "rms",
        "offset": 1.0,
        "squares": np.ones((2, 1), F32),
        "width": 3,
        "out": np.ones((2, 3), F32),
        "on": ON,
    }
    _core.norm(**arguments)
    with pytest.raises(ValueError, match="norm: " + message):
        _core.norm(**arguments | {argument: value})


def test_sum_squares():
    x = np.ones((2, 3), F32)
    with pytest.raises(ValueError, match=r"sum_squares: out: expected shape \[2, 1\], got \[2\]"):
        _core.sum_squares(x, np.ones(2, F32), ON)
    with pytest.raises(ValueError, match=r"sum_squares: out: expected dtype float32, got float16"):
        _core.sum_squares(x.astype(np.float16), np.ones((2, 1), np.float16), ON)


@pytest.mark.parametrize("cap", [0.0, -30.0, 1e-50, 1.1e5, np.inf, np.nan])
def test_caps_that_float32_does_not_hold(cap):
    message = f"softcap: cap: expected a number from 1.17549e-38 to 100000, got {cap:g}"
    with pytest.raises(ValueError, match=re.escape(message)):
        _core.softcap(np.ones((2, 3), F32), cap, ON)


def test_softcap():
    with pytest.raises(ValueError, match=r"softcap: x: expected dtype float32, got float16"):
        _core.softcap(np.ones((2, 3), np.float16), 30.0, ON)
    with pytest.raises(ValueError, match=r"softcap: x: expected shape \[any, any\], got \[3\]"):
        _core.softcap(np.ones(3, F32), 30.0, ON)


def test_rows():
    x = np.ones((2, 3), F32)
    with pytest.raises(ValueError, match=r"add: b: expected shape \[2, 3\], got \[2, 2\]"):
        _core.add(x, np.ones((2, 2), F32), x, ON)
    with pytest.raises(ValueError, match=r"sum_partials: out: expected shape \[2, 3\]"):
        _core.sum_partials(np.ones((4, 2, 3), F32), None, np.ones((3, 3), F32), ON)
    with pytest.raises(ValueError, match=r"gather_rows: index: expected dtype int32, got int64"):
        _core.gather_rows(x, np.zeros(2, np.int64), x, 0, ON)
    with pytest.raises(ValueError, match=r"gather_rows: first_row: expected at least 0, got -1"):
        _core.gather_rows(x, np.zeros(2, np.int32), x, -1, ON)
    state = np.ones((2, 1), F32), np.ones((2, 1), F32), np.ones((2, 1, 3), F32)
    with pytest.raises(ValueError, match=r"finish: o: expected a contiguous array"):
        _core.finish(*state, np.ones((4, 1, 3), F32)[::2], np.ones((2, 1), F32), ON)
