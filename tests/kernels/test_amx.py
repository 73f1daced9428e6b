"""Products in matrix tiles (AMX): the instruction's own arithmetic, and splits into bfloat16.

Every machine runs `amx_emulated`, the same sources over a model of the instructions. Here the model
is held against a plain statement of the rule, and against the hardware where there is one; what all
instruction sets promise, the other tests of kernels ask of it too.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from pympa import _core
from pympa.spec import DTYPES
from support.compare import assert_close, assert_same_bits, normal
from support.rig import cpu_rig

F32 = np.float32
SPLIT = ["float16", "float32"]
TINY = np.float32(2.0**-126)  # the smallest normal number
ISAS = _core.supported_isas()


@pytest.fixture(scope="module")
def tiles():
    if "amx_emulated" not in ISAS:
        pytest.skip("this CPU has no AVX2, on which the model of tiles runs")
    return cpu_rig("amx_emulated")


@pytest.fixture(scope="module")
def multiply_adds():
    """Return kernels that multiply float16 and float32 by fused multiply-adds."""
    found = [isa for isa in ISAS if isa in ("avx512", "avx2")]
    return cpu_rig(found[0]) if found else pytest.skip("this CPU has no fused multiply-add")


@pytest.fixture(scope="module")
def hardware():
    if "amx_bf16" not in ISAS:
        pytest.skip("this CPU has no AMX, or its kernel denies it")
    return cpu_rig("amx_bf16")


def rounded(exact: Fraction, sign_of_zero: float = 1.0) -> np.float32:
    """Return the nearest float32, ties to even; subnormal results become zero."""
    nearest = float(exact)
    if Fraction(nearest) != exact:  # round to odd first, so that rounding twice does no harm
        below = nearest if Fraction(nearest) < exact else np.nextafter(nearest, -np.inf)
        above = np.nextafter(below, np.inf)
        nearest = below if np.float64(below).view(np.int64) & 1 else above
    result = F32(nearest)
    # What is flushed is what an exponent without bounds would make smaller.
    if exact == 0 or abs(exact) < Fraction(2) ** -126 - Fraction(2) ** -151:
        return F32(np.copysign(0.0, sign_of_zero if exact == 0 else float(exact)))
    return result


def flushed(x: np.float32) -> np.float32:
    return F32(np.copysign(0, x)) if abs(x) < TINY else x


def fma(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    """Return a b + c by the rule of tiles."""
    a, b = flushed(a), flushed(b)
    if not np.isfinite([a, b, c]).all():
        with np.errstate(invalid="ignore"):
            return F32(np.float64(a) * np.float64(b) + np.float64(c))
    product = F32(np.copysign(1, a) * np.copysign(1, b))
    negative = product < 0 and np.signbit(c)
    with np.errstate(over="ignore"):
        return rounded(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)),
                       -1.0 if negative else 1.0)  # fmt: skip


def by_the_rule(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return x W^T of at most 512 terms: for each 32 of them, even and odd ones on their own."""
    out = np.zeros((len(x), len(weight)), F32)
    for i, row in enumerate(x.astype(F32)):
        for j, column in enumerate(weight.astype(F32)):
            total = F32(0)
            for k in range(0, len(row), 32):
                even = odd = F32(0)
                for pair in range(k, min(k + 32, len(row)), 2):
                    even = fma(row[pair], column[pair], even)
                    if pair + 1 < len(row):
                        odd = fma(row[pair + 1], column[pair + 1], odd)
                with np.errstate(invalid="ignore", over="ignore"):
                    total = flushed(total + flushed(even + odd))
            out[i, j] = total
    return out


def drawn(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Return bfloat16 numbers: of a few exponents, or of all bits that there are."""
    if kind == "near":
        return normal(rng, shape, DTYPES["bfloat16"])
    bits = rng.integers(0, 1 << 16, shape).astype(np.uint16)
    if kind == "small":  # products about the smallest normal number
        bits = (bits & 0x807F) | (rng.integers(55, 75, shape).astype(np.uint16) << 7)
    return bits.view(DTYPES["bfloat16"])


@pytest.mark.parametrize("kind", ["near", "small", "any"])
@pytest.mark.parametrize("terms", [1, 31, 32, 77])
def test_products_follow_the_rule(tiles, rng, kind, terms):
    x, weight = drawn(rng, (5, terms), kind), drawn(rng, (18, terms), kind)
    out = tiles.linear(x, weight, out_dtype=F32)
    want = by_the_rule(x, weight)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(want))
    assert_same_bits(np.where(np.isnan(want), 0, out), np.where(np.isnan(want), 0, want))


@pytest.mark.parametrize("isa", ["amx_emulated", "amx_bf16"])
def test_the_edge_of_the_normal_range(isa):
    """2^-126 - 2^-150 would round to 2^-126 as a subnormal number, and is flushed."""
    if isa not in ISAS:
        pytest.skip(f"this CPU has no {isa}")
    x = np.array([[2.0**-63, 0, 2.0**-75], [2.0**-63, 0, 2.0**-76]], F32).astype(DTYPES["bfloat16"])
    weight = np.array([[2.0**-63, 0, -(2.0**-75)]], F32).astype(DTYPES["bfloat16"])
    out = cpu_rig(isa).linear(x, weight, out_dtype=F32)
    assert out.ravel().tolist() == [0.0, 2.0**-126]


def calls(kernels, dtype, rng):
    """Return outputs of all that tiles multiply, by name."""
    x = normal(rng, (70, 600), dtype)
    gate, up, down = (normal(rng, shape, dtype, 0.05) for shape in ((90, 600), (90, 600), (45, 90)))
    q, k = normal(rng, (150, 4, 72), dtype), normal(rng, (700, 2, 72), dtype)
    v = normal(rng, (700, 2, 40), dtype)
    q_ranges = [(0, 550, 150)]
    rule = {"causal": True, "window": 300, "softcap": 20.0}
    return {
        "linear": kernels.linear(x, gate),
        "one row": kernels.linear(x[:1], gate),
        "gated": kernels.gated_linear(x, gate, up, activation="silu"),
        "mlp": kernels.mlp(x, up, down, gate=gate, activation="gelu"),
        "experts": kernels.linear(x, np.stack([gate, up]), group_rows=[30, 40]),
        "attention": kernels.attention(q, k, v, q_ranges=q_ranges)[0],
        "rule": kernels.attention(q, k, v, q_ranges=q_ranges, **rule)[0],
        "decode": kernels.attention(q[:1], k, v, q_ranges=[(0, 699, 1)], decode=True)[0],
        "log-sum-exp": kernels.attention(q[:3], k[:3], v[:3])[1],
    }


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_hardware_has_the_bits_of_the_model(hardware, tiles, dtype):
    found = calls(hardware, DTYPES[dtype], np.random.default_rng(5))
    for name, want in calls(tiles, DTYPES[dtype], np.random.default_rng(5)).items():
        assert found[name].tobytes() == want.tobytes(), name


def unsplittable(dtype: str) -> list[float]:
    """Return values that two or three bfloat16 cannot hold, or whose products would overflow."""
    return [np.inf, -np.inf, np.nan] + ([] if dtype == "float16" else [2.0**-103, 1e-42, 2.0**59])


def with_unsplittable(array: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a copy of which some rows cannot be split, those rows, and the others."""
    broken, values = array.copy(), unsplittable(dtype)
    rows = 2 + 5 * np.arange(len(values))
    broken[rows, 11:200:60] = np.array(values, dtype)[:, None]
    return broken, rows, np.setdiff1d(np.arange(len(array)), rows)


@pytest.mark.parametrize("dtype", SPLIT)
def test_rows_that_cannot_be_split(tiles, multiply_adds, rng, dtype):
    """Their sums are those of multiply-adds, and the other rows keep their bits."""
    x, weight = normal(rng, (40, 1030), dtype), normal(rng, (37, 1030), dtype, 0.05)
    broken, rows, others = with_unsplittable(x, dtype)
    found = tiles.linear(broken, weight, out_dtype=F32)
    want = multiply_adds.linear(broken, weight, out_dtype=F32)
    assert_same_bits(found[others], tiles.linear(x, weight, out_dtype=F32)[others])
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(want))
    np.testing.assert_array_equal(found[~np.isfinite(want)], want[~np.isfinite(want)])
    # Of one block of terms all of the sum comes from them.
    one_block = tiles.linear(broken[:, :512], weight[:, :512], out_dtype=F32)
    exact = multiply_adds.linear(broken[:, :512], weight[:, :512], out_dtype=F32)
    assert_same_bits(one_block[rows], exact[rows])


@pytest.mark.parametrize("dtype", SPLIT)
def test_columns_that_cannot_be_split(tiles, multiply_adds, rng, dtype):
    x, weight = normal(rng, (35, 512), dtype), normal(rng, (70, 512), dtype, 0.05)
    broken, columns, others = with_unsplittable(weight, dtype)
    found = tiles.linear(x, broken, out_dtype=F32)
    want = multiply_adds.linear(x, broken, out_dtype=F32)
    assert_same_bits(found[:, others], tiles.linear(x, weight, out_dtype=F32)[:, others])
    assert_same_bits(found[:, columns], want[:, columns])


def test_float32_keeps_its_tolerance_over_all_magnitudes(tiles, rng):
    scales = 2.0 ** rng.integers(-90, 60, (33, 1))
    x = (normal(rng, (33, 1500), F32) * scales).astype(F32)
    weight = normal(rng, (40, 1500), F32, 0.05)
    out = tiles.linear(x, weight)
    want = x.astype(np.float64) @ weight.astype(np.float64).T
    assert_close(out / scales, want / scales, F32)


def test_float32_sums_of_large_products_do_not_overflow(tiles):
    """Even terms alone reach 256 times a product before odd ones take it away."""
    x = np.full((3, 512), 1.9 * 2.0**58, F32)
    weight = np.where(np.arange(512) % 2, -x[:2], x[:2])
    assert (tiles.linear(x, weight) == 0).all()


@pytest.mark.parametrize(("exponent", "error"), [(-40, 2e-6), (-50, 2e-6), (-60, 2.0**-126)])
def test_float32_products_near_the_smallest_number(tiles, rng, exponent, error):
    """Below 2^-102 what is flushed shows: an absolute error for each product."""
    x, weight = (rng.uniform(1, 2, (n, 64)).astype(F32) * F32(2.0**exponent) for n in (9, 7))
    out = tiles.linear(x, weight)
    want = x.astype(np.float64) @ weight.astype(np.float64).T
    allowed = error * want if exponent > -60 else 64 * 5 * error
    assert (np.abs(out - want) <= allowed).all()


def test_workspaces_of_float32_attention_are_those_of_avx512():
    if not {"amx_emulated", "avx512"} <= set(ISAS):
        pytest.skip("this CPU has no AVX-512")
    for dims in ((32, 32), (96, 96), (128, 16), (64, 64), (576, 512)):
        sizes = {
            _core.attention_workspace_bytes(*dims, "float32", _core.Execution(isa))
            for isa in ("amx_emulated", "avx512")
        }
        assert len(sizes) == 1, dims


@pytest.mark.parametrize("rows", [1, 20, 40])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_attention_with_infinities(tiles, multiply_adds, rng, rows, where):
    """Float16: what sees an infinity comes out as by multiply-adds; the rest keeps its bits."""
    dtype = np.float16
    arrays = {
        "q": normal(rng, (rows, 2, 48), dtype),
        "k": normal(rng, (600, 2, 48), dtype),
        "v": normal(rng, (600, 2, 48), dtype),
    }
    q_ranges = [(0, 590 - rows, rows)]
    plain, _ = tiles.attention(**arrays, q_ranges=q_ranges)
    broken = arrays[where].copy()
    place = rows // 2 if where == "q" else 589 - rows // 2
    broken[place, 1, 3] = np.inf
    changed = arrays | {where: broken}
    found, lse = tiles.attention(**changed, q_ranges=q_ranges)
    want, want_lse = multiply_adds.attention(**changed, q_ranges=q_ranges)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(want))
    np.testing.assert_array_equal(np.isfinite(lse), np.isfinite(want_lse))
    finite = np.isfinite(want)
    assert_close(np.where(finite, found, 0), np.where(finite, want, 0), dtype)
    touched = np.zeros(found.shape, bool)
    if where == "q":
        touched[place, 1] = True
    else:  # rows from its position on see it
        touched[place - (590 - rows) :, 1, 3 if where == "v" else slice(None)] = True
    assert_same_bits(found[~touched], plain[~touched])
    assert touched.any()
