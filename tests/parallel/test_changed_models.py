"""Each field of a model matters: a run with another value of it fails verification."""

import msgspec
import numpy as np
import pytest

from pympa.model.model import Model
from pympa.model.random_weights import random_weights
from pympa.plan.mesh import Plan
from pympa.session.resources import build_resources
from pympa.spec import (
    DynamicScaling,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ModelSpec,
    Rope,
    Routing,
    YarnScaling,
)
from pympa.transport import Transport
from pympa.transport.endpoint import WORLD, NullEndpoint
from pympa.verify.collect import collect
from pympa.verify.compare import compare
from pympa.verify.oracle import oracle, routing_of
from support import worlds

LENGTHS, DTYPE = (37, 9), np.dtype(np.float32)
EXPERT = {"experts": 8, "top_k": 3, "shared_experts": 1}
GROUPS = Routing(score="sigmoid", choice_bias=True, groups=4, top_groups=2, group_score="top2",
                 scale=2.5, bias=True)  # fmt: skip
LATENT = worlds.LATENT.layers[1]
YARN = YarnScaling(factor=4.0, trained_context=128)
LLAMA3 = Llama3Scaling(factor=8.0, trained_context=24)
LONG = LongRopeScaling(short=(1.0, 1.5, 2.0, 2.5), long=(2.0, 3.0, 4.0, 5.0), trained_context=30,
                       factor=4.0)  # fmt: skip
SHORT = msgspec.structs.replace(LONG, trained_context=50)  # no sequence here is longer


def model(**others):
    return ModelSpec(d_model=32, vocabulary=97, layers=(layer(),), **others)


def layer(**fields):
    return LayerSpec(**{"heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_hidden": 40, **fields})


def of_layer(changed, **fields):
    """Return a model and the same one with some fields of its layer changed."""
    right = layer(**fields)
    wrong = msgspec.structs.replace(right, **changed)
    return tuple(ModelSpec(d_model=32, vocabulary=97, layers=(it,)) for it in (right, wrong))


def of_model(changed, **fields):
    right = model(**fields)
    return right, msgspec.structs.replace(right, **changed)


def of_rope(changed, **fields):
    right = Rope(**fields)
    return of_layer({"rope": msgspec.structs.replace(right, **changed)}, rope=right)


def of_scaling(changed, scaling, theta=30.0):
    other = msgspec.structs.replace(scaling, **changed)
    return of_rope({"scaling": other}, scaling=scaling, theta=theta)


def of_routing(changed, routing=GROUPS, **fields):
    other = msgspec.structs.replace(routing, **changed)
    return of_layer({"routing": other}, routing=routing, **EXPERT, **fields)


GATED = {"gated": True, "activation": "swiglu_clamped", "swiglu_limit": 1.0}
CHANGES = {
    "theta": of_rope({"theta": 9e3}),
    "rotated_dim": of_rope({"rotated_dim": 4}, rotated_dim=6),
    "trailing": of_rope({"trailing": False}, rotated_dim=6, trailing=True),
    "interleaved": of_rope({"interleaved": False}, interleaved=True),
    "no rope": of_layer({"rope": None}),
    "linear": of_scaling({"factor": 2.1}, LinearScaling(factor=2.0)),
    "no scaling": of_rope({"scaling": None}, scaling=LinearScaling(factor=2.0)),
    "llama3.factor": of_scaling({"factor": 7.0}, LLAMA3),
    "llama3.trained_context": of_scaling({"trained_context": 20}, LLAMA3),
    "llama3.low_frequency_factor": of_scaling({"low_frequency_factor": 1.2}, LLAMA3),
    "llama3.high_frequency_factor": of_scaling({"high_frequency_factor": 5.0}, LLAMA3),
    "yarn.factor": of_scaling({"factor": 5.0, "attention_factor": 1.1386294}, YARN),
    "yarn.trained_context": of_scaling({"trained_context": 64}, YARN),
    "yarn.beta_fast": of_scaling({"beta_fast": 2.0}, YARN),
    "yarn.beta_slow": of_scaling({"beta_slow": 0.3}, YARN),
    "yarn.truncate": of_scaling({"truncate": False}, YARN),
    "yarn.attention_factor": of_scaling({"attention_factor": 1.0}, YARN),
    "dynamic.factor": of_scaling({"factor": 3.0}, DynamicScaling(factor=2.0, trained_context=16)),
    "dynamic.trained_context": of_scaling({"trained_context": 20},
                                          DynamicScaling(factor=2.0, trained_context=16)),
    "longrope.long": of_scaling({"long": (2.0, 3.0, 4.0, 5.5)}, LONG),
    "longrope.trained_context": of_scaling({"trained_context": 60, "attention_factor": 1.186},
                                           LONG),
    "longrope.factor": of_scaling({"factor": 5.0}, LONG),
    "context": (of_scaling({}, SHORT)[0],
                msgspec.structs.replace(of_scaling({}, SHORT)[0], context=64)),
    "latent.norm_eps": of_layer(
        {"latent": msgspec.structs.replace(LATENT.latent, norm_eps=1e-2)},
        kv_heads=4, latent=LATENT.latent, rope=Rope(rotated_dim=4, trailing=True)),
    "qk_norm": of_layer({"qk_norm": "none"}, qk_norm="head"),
    "qk_norm of all": of_layer({"qk_norm": "none"}, qk_norm="all"),
    "attention_scale": of_layer({"attention_scale": None}, attention_scale=0.3),
    "window": of_layer({"window": 10}, window=9),
    "no window": of_layer({"window": None}, window=9),
    "softcap": of_layer({"softcap": 6.0}, softcap=5.0),
    "gated": of_layer({"gated": False}, gated=True),
    "activation": of_layer({"activation": "gelu"}),
    "silu": of_layer({"activation": "gelu_tanh"}, activation="silu", gated=True),
    "swiglu_limit": of_layer({"swiglu_limit": 1.1}, **GATED),
    "swiglu_alpha": of_layer({"swiglu_alpha": 1.7}, **GATED),
    "swiglu": of_layer({"activation": "silu", "swiglu_limit": 7.0}, **GATED),
    "norm_eps": of_layer({"norm_eps": 1e-3}),
    "norm_offset": of_layer({"norm_offset": False}, norm_offset=True),
    "norm_offset of q and k": of_layer({"norm_offset": False}, norm_offset=True, qk_norm="all"),
    "norm_order": of_layer({"norm_order": "pre"}, norm_order="sandwich"),
    "no norm before": of_layer({"norm_order": "post"}, norm_order="sandwich"),
    "parallel": of_layer({"parallel": False}, parallel=True),
    "top_k": of_layer({"top_k": 2}, experts=8, top_k=3),
    "renormalize": of_layer({"renormalize": False}, experts=8, top_k=3),
    "score": of_routing({"score": "softmax"}),
    "groups": of_routing({"groups": 2, "top_groups": 1}),
    "top_groups": of_routing({"top_groups": 3}),
    "group_score": of_routing({"group_score": "largest"}),
    "scale": of_routing({"scale": 1.0}),
    "capacity": of_layer({"capacity_factor": 1.0}, experts=8, top_k=3, capacity_factor=1.2,
                         capacity_group=16),
    "causal": of_model({"causal": False}),
    "embedding_scale": of_model({"embedding_scale": 5.0}, embedding_scale=5.5),
    "logit_softcap": of_model({"logit_softcap": None}, logit_softcap=3.0),
}  # fmt: skip


def run(spec, source):
    """Run a model on one rank."""
    rank = build_resources(NullEndpoint(0, 1), Plan(), isa=worlds.ISA)
    world = Transport(NullEndpoint(0, 1), WORLD, range(1), rank.arena, rank.trace, rank.traffic)
    engine = Model(spec, rank, DTYPE, source)
    outputs = collect(engine, engine.prepare(worlds.batch(LENGTHS, spec.vocabulary)), world)
    assert outputs is not None
    return outputs


def passes(spec, outputs):
    ids = worlds.batch(LENGTHS, spec.vocabulary)
    truth = oracle(spec, DTYPE, random_weights(spec), ids, routing_of(outputs))
    return compare(spec, DTYPE, outputs, truth).passed


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_field_is_noticed(name):
    right, wrong = CHANGES[name]
    source = random_weights(right)
    assert passes(right, run(right, source))
    assert not passes(right, run(wrong, source))


LEFT_OUT = {
    "attention.sinks": layer(sinks=True),
    "attention.q_bias": layer(attention_bias=True),
    "attention.out_bias": layer(out_bias=True),
    "mlp.up_bias": layer(mlp_bias=True),
    "router_bias": layer(routing=Routing(bias=True), **EXPERT),
    "choice_bias": layer(routing=GROUPS, **EXPERT),
    "shared_gate": layer(shared_gate=True, **EXPERT),
    "attention.q_norm": layer(qk_norm="all"),
    "attention_post_norm.weight": layer(norm_order="sandwich"),
    "attention.kv_latent_norm": layer(kv_heads=4, latent=LATENT.latent,
                                      rope=Rope(rotated_dim=4, trailing=True)),
    "attention.k_rotated": layer(kv_heads=4, latent=LATENT.latent,
                                 rope=Rope(rotated_dim=4, trailing=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_changed_weight_is_noticed(name):
    spec = ModelSpec(d_model=32, vocabulary=97, layers=(LEFT_OUT[name],))
    right = random_weights(spec)

    class Changed:
        identity = "changed"

        def read(self, weight, out, rows=None, cols=None):
            found = right.read(weight, out, rows, cols)
            if not weight.name.endswith(name):
                return found
            return found[::-1].copy() if found.ndim == 1 else found[..., ::-1].copy()

    assert passes(spec, run(spec, right))
    assert not passes(spec, run(spec, Changed()))
