"""A second opinion on the oracle: torch, which shares nothing with it."""

import math
import tracemalloc

import msgspec
import numpy as np
import pytest

from pympa.model.random_weights import random_weights
from pympa.spec import DTYPES, LayerSpec, ModelSpec
from pympa.verify import reference
from pympa.verify.oracle import oracle_weights
from pympa.verify.reference.erf import erf
from pympa.verify.reference.softmax_attention import MOST_SCORES, visible_blocks
from support import worlds
from support.compare import assert_same_numbers
from support.lanes import FULL

torch = pytest.importorskip("torch", reason="torch is the extra 'peers'")
functional = torch.nn.functional


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def torch_rope(x, rope, rotated):
    """Rotate pairs (i, i + rotated/2) as complex numbers."""
    half = rotated // 2
    positions = torch.arange(len(x), dtype=torch.float64)
    frequency = rope.theta ** (-torch.arange(half, dtype=torch.float64) / half)
    if rope.scaling is not None:
        frequency = frequency / rope.scaling.factor
    frequency = frequency.float().double()
    turn = torch.polar(
        torch.ones(len(x), half, dtype=torch.float64), positions[:, None] * frequency
    )
    pairs = torch.complex(x[..., :half].contiguous(), x[..., half:rotated].contiguous())
    pairs = pairs * turn[:, None]
    return torch.cat([pairs.real, pairs.imag, x[..., rotated:]], dim=-1)


def torch_norm(layer, x, weight, bias=None):
    if layer.norm == "layer":
        return functional.layer_norm(x, x.shape[-1:], weight, bias, layer.norm_eps)
    return functional.rms_norm(x, x.shape[-1:], weight, layer.norm_eps)


def torch_attention(spec, layer, q, k, v):
    kv = [layer.kv_head_of(h) for h in range(layer.heads)]
    q, k, v = q.transpose(0, 1), k.transpose(0, 1)[kv], v.transpose(0, 1)[kv]
    scores = q @ k.transpose(1, 2) / layer.head_dim**0.5
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    rows = torch.arange(q.shape[1])
    distance = rows[:, None] - rows
    hidden = (distance < 0) & spec.causal
    if layer.window:
        hidden |= distance.abs() >= layer.window
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return (weights @ v).transpose(0, 1).reshape(q.shape[1], -1)


def torch_forward(spec, weight, ids):
    """One sequence; returns the last residual stream and the last logits."""

    def get(name):
        return tensor(weight(name))

    x = get("embedding")[torch.from_numpy(ids).long()]
    for index, layer in enumerate(spec.blocks):
        at = f"layers.{index}."

        def linear(rows, name, biased, at=at):
            return functional.linear(
                rows, get(at + name), get(f"{at}{name}_bias") if biased else None
            )

        def norm(rows, name, at=at, layer=layer):
            bias = get(f"{at}{name}.bias") if layer.norm == "layer" else None
            return torch_norm(layer, rows, get(f"{at}{name}.weight"), bias)

        normed = norm(x, "attention_norm")
        q, k, v = (linear(normed, f"attention.{n}", layer.attention_bias) for n in "qkv")
        q = q.reshape(len(x), layer.heads, -1)
        k, v = (t.reshape(len(x), layer.n_kv_heads, -1) for t in (k, v))
        if layer.qk_norm == "head":
            q, k = (
                functional.rms_norm(t, t.shape[-1:], get(f"{at}attention.{n}_norm"), layer.norm_eps)
                for t, n in ((q, "q"), (k, "k"))
            )
        if layer.rope:
            q, k = (torch_rope(t, layer.rope, layer.rotated_dim) for t in (q, k))
        o = torch_attention(spec, layer, q, k, v)
        x = x + linear(o, "attention.out", layer.attention_bias)
        normed = norm(x, "mlp_norm")
        act = {
            "gelu": functional.gelu,
            "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
            "silu": functional.silu,
        }[layer.activation]
        up = linear(normed, "mlp.up", layer.mlp_bias)
        hidden = act(linear(normed, "mlp.gate", layer.mlp_bias)) * up if layer.gated else act(up)
        x = x + linear(hidden, "mlp.down", layer.mlp_bias)
    last = spec.blocks[-1]
    bias = get("final_norm.bias") if last.norm == "layer" else None
    normed = torch_norm(last, x[-1:], get("final_norm.weight"), bias)
    return x, functional.linear(normed, get("embedding" if spec.tied_head else "head"))


@pytest.mark.parametrize(
    "spec", [worlds.DENSE, worlds.ODD, worlds.WINDOWED, worlds.NOT_CAUSAL],
    ids=["dense", "odd", "window", "full"],
)  # fmt: skip
def test_whole_models(spec):
    weight = oracle_weights(spec, DTYPES["bfloat16"], random_weights(spec))
    batch = worlds.batch((33, 1), spec.vocabulary)
    outputs, logits = reference.forward(spec, weight, batch)
    expected = [torch_forward(spec, weight, ids) for ids in batch]
    assert_same_numbers(outputs["output"], np.concatenate([x for x, _ in expected]))
    assert_same_numbers(logits, np.concatenate([last for _, last in expected]))


def test_lse_and_rows_that_see_nothing():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 2, 4)) for n in (3, 5, 5))
    o, lse = reference.attention(
        q, k, v, np.array([0, 4, 9]), np.arange(5) + 3, kv_head_of_q=[0, 1], scale=0.5
    )
    assert (o[0] == 0).all()
    assert (lse[0] == -np.inf).all()
    for row, keys in ((1, 2), (2, 5)):
        scores = torch.einsum("hd,khd->hk", tensor(q[row]), tensor(k[:keys])) * 0.5
        assert_same_numbers(lse[row], torch.logsumexp(scores, dim=1).numpy())


def test_the_wrong_activation_is_named():
    with pytest.raises(ValueError, match="got 'relu'"):
        reference.activate(np.zeros(1), "relu")


def test_erf_to_the_last_bits():
    cuts = [-6.0, -4.0, -0.46875, 0.0, 0.46875, 4.0, 6.0]
    near_cuts = [np.nextafter(cut, to) for cut in cuts for to in (-9.0, 9.0)]
    x = np.concatenate([np.linspace(-7, 7, 100_001), np.logspace(-300, 1, 10_001), cuts, near_cuts])
    want = np.array([math.erf(value) for value in x])
    np.testing.assert_allclose(erf(x), want, rtol=1e-15, atol=0)
    special = np.array([[np.inf, -np.inf], [np.nan, -0.0]])
    found = erf(special)
    assert found[0].tolist() == [1.0, -1.0]
    assert np.isnan(found[1, 0])
    assert found[1, 1] == 0.0
    assert erf(np.zeros((3, 0))).shape == (3, 0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 300, 5000])
@pytest.mark.parametrize("rows", [slice(None), slice(7, None, 131), slice(0, 1)])
def test_blocks_hold_every_visible_pair_once(causal, window, rows, monkeypatch):
    monkeypatch.setattr("pympa.verify.reference.softmax_attention.MOST_SCORES", 20_000)
    queries, keys = np.arange(1500)[rows], np.arange(1500) + 3
    distance = queries[:, None] - keys
    visible = (distance >= 0) if causal else np.ones(distance.shape, bool)
    if window is not None:
        visible &= np.abs(distance) < window
    seen = np.zeros(distance.shape, int)
    for here, there in visible_blocks(queries, keys, causal, window):
        block = seen[here, there]
        block += 1
        assert len(block) == 1 or block.size <= 20_000
    assert (seen <= 1).all()
    assert (seen[visible] == 1).all()
    if window is not None and rows == slice(None):
        assert seen.sum() <= 2 * len(queries) * (2 * window + 130), "no more than the window asks"


def test_blocks_give_what_the_whole_gives(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((700, 2, 8)) for _ in range(3))
    places, shuffled = np.arange(700), rng.permutation(700)

    def attend(window, order=places):
        return reference.attention(
            q, k[order], v[order], places, places[order], kv_head_of_q=[0, 1], scale=0.5,
            window=window, softcap=5.0,
        )  # fmt: skip

    for window in (None, 50):
        whole = attend(window)
        with monkeypatch.context() as patch:
            patch.setattr("pympa.verify.reference.softmax_attention.MOST_SCORES", 900)
            cut, turned = attend(window), attend(window, shuffled)
        for want, *found in zip(whole, cut, turned, strict=True):
            for array in found:
                assert_same_numbers(array, want)


@FULL
def test_a_million_tokens_with_a_window():
    """1,000,003 tokens, window 4, d_model 8, two layers: scores of all pairs would be 8 TB."""
    tokens = 1_000_003
    layer = LayerSpec(repeat=2, heads=1, head_dim=8, mlp_hidden=16, window=4)
    spec = ModelSpec(d_model=8, vocabulary=256, layers=(layer,))
    ids = np.resize(np.arange(251, dtype=np.int32), tokens)
    weight = oracle_weights(spec, DTYPES["float32"], random_weights(spec))
    outputs, _ = reference.forward(spec, weight, [ids])
    last = reference.forward(spec, weight, [ids[:600]])[0]
    for name in outputs:
        assert_same_numbers(outputs[name][:600], last[name])


@FULL
def test_memory_is_linear_in_the_tokens_of_a_causal_sequence():
    layer = LayerSpec(heads=1, head_dim=4, mlp_hidden=8)
    spec = ModelSpec(d_model=8, vocabulary=256, layers=(layer,))
    weight = oracle_weights(spec, DTYPES["float32"], random_weights(spec))
    ids = np.zeros(20_000, np.int32)
    tracemalloc.start()
    try:
        reference.forward(spec, weight, [ids])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * MOST_SCORES + 1000 * len(ids) < 8 * len(ids) ** 2


def test_a_window_wider_than_the_sequence_is_none():
    wide = msgspec.structs.replace(worlds.DENSE.layers[0], window=10_000)
    spec = msgspec.structs.replace(worlds.DENSE, layers=(wide,))
    weight = oracle_weights(spec, DTYPES["float32"], random_weights(spec))
    batch = worlds.batch((300, 2))
    one, other = (reference.forward(model, weight, batch) for model in (spec, worlds.DENSE))
    assert_same_numbers(one[1], other[1])


def test_hidden_values_that_are_not_finite():
    """A row gives what the values that it sees give, by IEEE's rules."""
    q = k = np.ones((4, 1, 8))
    v = np.ones((4, 1, 3))
    v[2, 0] = [np.nan, np.inf, 5.0]
    at = np.arange(4)
    options = {"kv_head_of_q": [0], "scale": 1.0}
    o, _ = reference.attention(q, k, v, at, at, **options)
    assert_same_numbers(o[:2], np.ones((2, 1, 3)))
    np.testing.assert_array_equal(np.isfinite(o[2:, 0]), [[False, False, True]] * 2)
    assert o[3, 0, 1] == np.inf
    o, _ = reference.attention(q, k, v, at, at, window=1, **options)
    assert_same_numbers(o[[0, 1, 3]], np.ones_like(o[[0, 1, 3]]))
