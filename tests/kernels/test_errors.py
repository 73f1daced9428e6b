"""Wrong arguments raise ValueError that names the argument, what was expected and what came."""

import re

import numpy as np
import pytest

from pympa import _core
from pympa.kernels import AttentionSpec
from pympa.spec import SpecError

ISA = _core.supported_isas()[0]
ON = _core.Execution(ISA)
F32 = np.float32


def linear_arguments():
    weight = np.ones((6, 4), F32)
    packed = np.empty(_core.packed_weight_bytes(6, 4, "float32", ON), np.uint8)
    _core.pack_weight(weight, packed, ON)
    workspace = _core.linear_workspace_bytes(3, 6, 4, "float32", False, ON)
    return {
        "x": np.ones((3, 4), F32),
        "packed": packed,
        "out": np.empty((3, 6), F32),
        "bias": None,
        "activation": "none",
        "residual": None,
        "branch": None,
        "group_rows": None,
        "workspace": np.empty(workspace, np.uint8),
        "on": ON,
    }


def grouped_arguments():
    packed = np.stack([linear_arguments()["packed"]] * 2)
    return linear_arguments() | {"packed": packed, "group_rows": np.array([1, 2])}


def attend_arguments():
    workspace = _core.attention_workspace_bytes(8, 6, "float32", ON)
    return {
        "q": np.ones((5, 2, 8), F32),
        "k": np.ones((7, 1, 8), F32),
        "v": np.ones((7, 1, 6), F32),
        "q_ranges": np.array([[0, 0, 5]]),
        "k_ranges": np.array([[0, 0, 7, 0]]),
        "row_max": np.full((5, 2), -np.inf, F32),
        "row_sum": np.zeros((5, 2), F32),
        "out": np.zeros((5, 2, 6), F32),
        "kv_head_of_q": np.zeros(2, np.int32),
        "scale": 1.0,
        "causal": True,
        "window": 0,
        "softcap": 0.0,
        "decode": False,
        "workspace": np.empty(workspace, np.uint8),
        "on": ON,
    }


def read_only(shape):
    array = np.ones(shape, F32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("x", np.ones((3, 4)), r"x: expected dtype .*float32.*, got float64"),
        ("x", np.ones((3, 4), np.int32), r"x: expected .*bfloat16, got int32"),
        ("x", np.ones(4, F32), r"x: expected shape \[any, any\], got \[4\]"),
        ("x", np.ones((4, 3), F32).T, r"x: expected a contiguous last dimension, got stride 3"),
        ("out", np.ones((2, 6), F32), r"out: expected shape \[3, any\], got \[2, 6\]"),
        ("out", np.ones((3, 6), np.float16), r"out: expected dtype float32, got float16"),
        ("out", read_only((3, 6)), r"out: expected a writeable array"),
        ("bias", np.ones(5, F32), r"bias: expected shape \[6\], got \[5\]"),
        ("bias", np.ones(6, np.float16), r"bias: expected dtype float32, got float16"),
        ("residual", np.ones((3, 5), F32), r"residual: expected shape \[3, 6\], got \[3, 5\]"),
        ("branch", np.ones((4, 6), F32), r"branch: expected shape \[3, 6\], got \[4, 6\]"),
        ("activation", "relu", r"activation: expected none, gelu, .*, got 'relu'"),
        ("packed", np.ones(8, np.uint8), r"packed: expected at least \d+ bytes, got 8 bytes"),
        ("workspace", np.ones(8, np.uint8), r"workspace: expected at least \d+ bytes, got 8"),
        ("workspace", np.ones(8, np.int32), r"workspace: expected dtype uint8, got int32"),
    ],
)
def test_linear(argument, value, message):
    _core.linear(**linear_arguments())
    with pytest.raises(ValueError, match="linear: " + message):
        _core.linear(**linear_arguments() | {argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("group_rows", np.array([1, 1]), r"group_rows: .* add up to 3 rows, got 1 too few"),
        ("group_rows", np.array([2, 3]), r"group_rows: .* add up to 3 rows, got 2 too many"),
        ("group_rows", np.array([2**63 - 1, 2]), r"group_rows: .* add up to 3 rows, got \d+ too"),
        ("group_rows", np.array([-1, 4]), r"group_rows: expected at least 0, got -1"),
        ("group_rows", np.array([1, 2], np.int32), r"group_rows: expected dtype int64, got int32"),
        ("group_rows", np.array([1, 1, 1]), r"packed: expected shape \[3, any\], got \[2, "),
        ("packed", np.ones((2, 8), np.uint8), r"packed: expected at least \d+ bytes, got 8 bytes"),
        ("packed", np.ones(8, np.uint8), r"packed: expected shape \[2, any\], got \[8\]"),
        ("bias", np.ones(6, F32), r"bias: expected shape \[2, 6\], got \[6\]"),
        ("bias", np.ones((2, 6), np.float16), r"bias: expected dtype float32, got float16"),
        ("out", np.ones((2, 6), F32), r"out: expected shape \[3, any\], got \[2, 6\]"),
        ("workspace", np.ones(8, np.uint8), r"workspace: expected at least \d+ bytes, got 8"),
    ],
)
def test_linear_of_groups(argument, value, message):
    _core.linear(**grouped_arguments())
    with pytest.raises(ValueError, match="linear: " + message):
        _core.linear(**grouped_arguments() | {argument: value})


def mlp_arguments():
    arguments = linear_arguments()
    down = np.zeros((5, 6), np.float32)
    packed = np.zeros(_core.packed_weight_bytes(5, 6, "float32", ON), np.uint8)
    _core.pack_weight(down, packed, ON)
    workspace = _core.mlp_workspace_bytes(2, 6, 5, "float32", False, ON)
    for name in ("bias", "residual", "branch"):
        arguments[name] = None
    return (
        {name: value for name, value in arguments.items() if name != "packed"}
        | {"packed_gate": None, "packed_up": arguments["packed"], "packed_down": packed}
        | {
            "bias_gate": None,
            "bias_up": None,
            "activation": "silu",
            "limit": 0.0,
            "alpha": 0.0,
            "hidden": 6,
            "item_rows": 2,
        }
        | {"out": np.zeros((3, 5), np.float32)}
        | {"workspace": np.zeros(workspace, np.uint8)}
    )


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("item_rows", 0, "item_rows: expected at least 1, got 0"),
        ("hidden", -1, "hidden: expected at least 0, got -1"),
        ("hidden", 600, "workspace: expected"),
        ("packed_up", np.zeros(3, np.uint8), "packed_up: expected"),
        ("packed_down", np.zeros(3, np.uint8), "packed_down: expected"),
        ("packed_gate", np.zeros(3, np.uint8), "workspace: expected"),
        ("workspace", np.zeros(3, np.uint8), "workspace: expected"),
        ("bias_up", np.zeros(5, np.float32), "bias_up: expected"),
        ("bias", np.zeros(6, np.float32), "bias: expected"),
        ("residual", np.zeros((3, 6), np.float32), "residual: expected"),
        ("group_rows", np.array([1, 1]), "group_rows: expected"),
        (
            "activation",
            "tanh",
            "activation: expected none, .* or swiglu_clamped, got 'tanh'",
        ),
    ],
)
def test_mlp(argument, value, message):
    _core.mlp(**mlp_arguments())
    with pytest.raises(ValueError, match=message):
        _core.mlp(**mlp_arguments() | {argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("k", np.ones((7, 1, 9), F32), r"k: expected shape \[any, any, 8\], got \[7, 1, 9\]"),
        ("k", np.ones((7, 1, 8), np.float16), r"k: expected dtype float32, got float16"),
        ("v", np.ones((7, 1, 0), F32), r"v_head_dim: expected at least 1, got 0"),
        ("v", np.ones((6, 1, 6), F32), r"v: expected shape \[7, 1, any\], got \[6, 1, 6\]"),
        ("q_ranges", np.array([[0, 0, 4]]), r"q_ranges: expected lengths .* 5 rows, got 4"),
        (
            "k_ranges",
            np.array([[0, 0, 8, 0]]),
            r"k_ranges: expected rows in \[0, 7\), got 8 rows from 0",
        ),
        (
            "k_ranges",
            np.array([[0, 0, 2, 6]]),
            r"k_ranges: expected rows in \[0, 7\), got 2 rows from 6",
        ),
        ("k_ranges", np.array([[0, 0, 2, -1]]), r"first row: expected at least 0, got -1"),
        ("k_ranges", np.array([[0, -1, 7, 0]]), r"range start: expected at least 0, got -1"),
        ("k_ranges", np.array([[0, 7]]), r"k_ranges: expected shape \[any, 4\], got \[1, 2\]"),
        ("k_ranges", np.ones((1, 4), np.int32), r"k_ranges: expected dtype int64, got int32"),
        ("kv_head_of_q", np.array([0, 1], np.int32), r"kv_head_of_q: .*\[0, 1\), got 1 for head 1"),
        ("kv_head_of_q", np.zeros(3, np.int32), r"kv_head_of_q: expected shape \[2\], got \[3\]"),
        ("row_max", np.zeros((5, 1), F32), r"row_max: expected shape \[5, 2\], got \[5, 1\]"),
        ("row_sum", np.zeros((5, 2)), r"row_sum: expected dtype .*, got float64"),
        ("out", np.zeros((5, 2, 8), F32), r"out: expected shape \[5, 2, 6\], got \[5, 2, 8\]"),
        ("out", np.zeros((5, 2, 6), np.float16), r"out: expected dtype float32, got float16"),
        ("window", -1, r"window: expected at least 0, got -1"),
        ("scale", float("nan"), r"abs\(scale\): expected 0 or a number from .*, got nan"),
        (
            "scale",
            1e-50,
            r"abs\(scale\): expected 0 or a number from 1\.17549e-38 to 1e\+30, got 1",
        ),
        ("scale", -1e39, r"abs\(scale\): expected 0 or a number from .*, got 1e\+39"),
        ("workspace", np.ones(8, np.uint8), r"workspace: expected at least \d+ bytes, got 8"),
    ],
)
def test_attend_block(argument, value, message):
    _core.attend_block(**attend_arguments())
    with pytest.raises(ValueError, match=message):
        _core.attend_block(**attend_arguments() | {argument: value})


@pytest.mark.parametrize(
    "softcap", [-1.0, 1e-50, 7e-46, 2.9e-39, 1.1e-38, 1.1e5, 1e6, 1e8, 1e39, np.inf, np.nan]
)
def test_softcaps_that_float32_does_not_hold(softcap):
    message = f"softcap: expected 0 or a number from 1.17549e-38 to 100000, got {softcap:g}"
    with pytest.raises(ValueError, match=re.escape("attend_block: " + message)):
        _core.attend_block(**attend_arguments() | {"softcap": softcap})
    with pytest.raises(SpecError, match="softcap: expected a number from"):
        AttentionSpec(np.zeros(1, np.int32), 1.0, True, softcap=softcap)


@pytest.mark.parametrize("scale", [1e-50, -1e-39, 1e31, np.inf, np.nan])
def test_scales_that_float32_does_not_hold(scale):
    with pytest.raises(SpecError, match="scale: expected 0 or a number from"):
        AttentionSpec(np.zeros(1, np.int32), scale, True)


def test_names_and_sizes():
    with pytest.raises(ValueError, match=r"dtype: expected float32, float16 or bfloat16, got 'f'"):
        _core.packed_weight_bytes(1, 1, "f", ON)
    with pytest.raises(ValueError, match=r"bytes: head_dim: expected at least 0, got -1"):
        _core.attention_workspace_bytes(-1, 1, "float32", ON)
    with pytest.raises(ValueError, match=r"seconds: expected a number in \(0, 60\]"):
        _core.product_peak("float32", ISA, 0.0)
    with pytest.raises(ValueError, match=r"bytes: expected at least 4096, got 1"):
        _core.read_bandwidth(1, 0.1, 1)


@pytest.mark.parametrize(
    ("isa", "threads", "message"),
    [
        (ISA, 0, "Execution: threads: expected at least 1, got 0"),
        ("sse9", 1, r"isa: expected one this machine supports \(.*portable.*\), got 'sse9'"),
    ],
)
def test_execution(isa, threads, message):
    with pytest.raises(ValueError, match=message):
        _core.Execution(isa, threads=threads)
