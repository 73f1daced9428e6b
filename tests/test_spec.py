"""TOML to specs: what is wrong is named."""

import pytest

from pympa.bench.experiment import Experiment, load_experiment, packaged_experiments
from pympa.spec import LayerSpec, ModelSpec, Rope, SpecError, numpy_dtype, parse_toml

MODEL = "d_model = 8\nvocabulary = 16\nlayers = [{ heads = 2, head_dim = 4, mlp_hidden = 8 }]\n"


def test_repeat_unrolls():
    layer = LayerSpec(heads=2, head_dim=4, mlp_hidden=8, repeat=3)
    spec = ModelSpec(d_model=8, vocabulary=4, layers=(layer, layer))
    assert len(spec.blocks) == 6


def test_kv_heads_need_not_divide():
    layer = LayerSpec(heads=7, kv_heads=3, head_dim=4, mlp_hidden=8)
    assert [layer.kv_head_of(h) for h in range(7)] == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("heads = 2", "heads = 0"), "heads: expected a positive number; got 0"),
        (("heads = 2", f"heads = {2**31}"), "heads: expected at most 1.07374e+09; got 2.14748e+09"),
        (("heads = 2", "heads = 2, repeat = 10001"), "expected at most 10,000 of them; got 10,001"),
        (("heads = 2", "heads = 2, norm_eps = nan"), "norm_eps: expected a number from 0 to 1e+30"),
        (("heads = 2", "heads = 2, softcap = inf"), "softcap: expected at most 1e+30; got inf"),
        (("heads = 2", "heads = 2, rope = {theta = 0.0}"), "theta: expected a positive number"),
        (("heads = 2", "heads = 2, kv_heads = 3"), "kv_heads: expected at most heads=2"),
        (("head_dim = 4", "head_dim = 5"), "expected an even number in 2..5"),
        (
            ("heads = 2", "headz = 2"),
            "unknown field `headz` - at `$.layers[0]`; did you mean `heads`?",
        ),
        (("heads = 2", 'heads = "2"'), "Expected `int`, got `str` - at `$.layers[0].heads`"),
        (("heads = 2", 'heads = 2, norm = "batch"'), "Invalid enum value 'batch'"),
        (("d_model = 8\n", ""), "missing required field `d_model`"),
        (("d_model = 8", "d_model = "), "model.toml"),
    ],
)
def test_mistakes(change, says):
    with pytest.raises(SpecError) as error:
        parse_toml(MODEL.replace(*change).encode(), ModelSpec, "model.toml")
    assert says in str(error.value)


def test_not_utf8():
    with pytest.raises(SpecError, match=r"model\.toml"):
        parse_toml(b"\xff\xfe", ModelSpec, "model.toml")


def test_no_layers_and_dtypes():
    with pytest.raises(SpecError, match="at least one layer"):
        ModelSpec(d_model=8, vocabulary=4, layers=())
    with pytest.raises(SpecError, match="float32, float16, bfloat16; got 'int4'"):
        numpy_dtype("int4")
    with pytest.raises(SpecError, match="rotated_dim"):
        LayerSpec(heads=1, head_dim=4, mlp_hidden=4, rope=Rope(rotated_dim=6))


def test_packaged_experiments_state_the_papers_sizes():
    loaded = {name: load_experiment(name) for name in packaged_experiments()}
    dense = loaded["ring-dense"].sizes["paper"]
    assert (dense.batch, dense.tokens, dense.model.d_model) == (128, 100_000, 4096)
    fp16 = loaded["ring-dense-fp16"]
    assert (fp16.sizes["paper"].batch, fp16.sizes["paper"].tokens) == (1, 1024)
    assert fp16.sizes["long"].tokens == 131_072
    assert fp16.sizes["long"].ours
    assert {b.head_dim for b in fp16.sizes["paper"].model.blocks} == {512}
    published = {
        "ring-dense": [1.2e6, 1.45e6], "ring-dense-fp16": [1.2e6, 1.45e6],
        "ring-moe": [0.95e6, 1.18e6, None], "experts": [120e3, 450e3],
    }  # fmt: skip
    for name, tps in published.items():
        assert [p.published_tps for p in loaded[name].plans] == tps


def test_a_plan_row_has_a_family_or_a_plan():
    with pytest.raises(SpecError, match="either a family or a plan"):
        parse_toml(
            b'title="t"\ndtype="float32"\nsizes={}\nplans=[{role="x"}]', Experiment, "x.toml"
        )
