"""A second opinion on the oracle: torch, which shares nothing with it."""

import numpy as np
import pytest

import worlds
from pympa import reference
from pympa.spec import DTYPES
from pympa.verify import oracle_weights
from pympa.weights import PhiloxSource

torch = pytest.importorskip("torch", reason="torch is the extra 'peers'")
functional = torch.nn.functional


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def torch_rope(x, rope, rotated):
    """Rotate pairs (i, i + rotated/2) as complex numbers."""
    half = rotated // 2
    positions = torch.arange(len(x), dtype=torch.float64) / rope.scaling_factor
    frequency = rope.theta ** (-torch.arange(half, dtype=torch.float64) / half)
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
        if layer.qk_norm:
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
    weight = oracle_weights(spec, DTYPES["bfloat16"], PhiloxSource())
    batch = worlds.batch((33, 1), spec.vocabulary)
    outputs, logits = reference.forward(spec, weight, batch)
    expected = [torch_forward(spec, weight, ids) for ids in batch]
    np.testing.assert_allclose(outputs["output"], np.concatenate([x for x, _ in expected]), 1e-9)
    np.testing.assert_allclose(logits, np.concatenate([last for _, last in expected]), 1e-9)


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
        np.testing.assert_allclose(lse[row], torch.logsumexp(scores, dim=1).numpy())


def test_the_wrong_activation_is_named():
    with pytest.raises(ValueError, match="got 'relu'"):
        reference.activate(np.zeros(1), "relu")
