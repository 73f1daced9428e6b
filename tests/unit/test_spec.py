"""TOML to specs: what is wrong is named."""

import pytest

from pympa.bench.experiment.description import Experiment, load_experiment, packaged_experiments
from pympa.spec import LayerSpec, ModelSpec, Rope, SpecError, numpy_dtype
from pympa.text.toml import parse_toml
from support.experiments import TINY

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
        (
            ("heads = 2", "heads = 2, norm_eps = nan"),
            "expected 0 or a number from 1.18e-38 to 1e+30",
        ),
        (("heads = 2", "heads = 2, norm_eps = 1e-50"), "norm_eps: expected 0 or a number from"),
        (
            ("heads = 2", "heads = 2, softcap = inf"),
            "softcap: expected a number from 1.18e-38 to 100000, or None for no cap; got inf",
        ),
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("heads = 2", "heads = 2, rope_theta = 1.0"), "`$.layers[0]`; did you mean `rope.theta`?"),
        (("heads = 2", "heads = 2, theta = 1.0"), "did you mean `rope.theta`?"),
        (("heads = 2", "heads = 2, rotated_dims = 4"), "did you mean `rope.rotated_dim`?"),
        (("heads = 2", "heads = 2, d_model = 8"), "`$.layers[0]`; this field belongs to `$`"),
        (("d_model = 8", "d_model = 8\nkv_heads = 2"), "did you mean `layers[...].kv_heads`?"),
        (("heads = 2", "heads = 2, zzz = 1"), "unknown field `zzz` - at `$.layers[0]`"),
    ],
)
def test_what_a_field_was_meant_to_be(change, says):
    with pytest.raises(SpecError) as error:
        parse_toml(MODEL.replace(*change).encode(), ModelSpec, "model.toml")
    assert str(error.value).endswith(says)


def test_fields_that_are_in_the_wrong_table():
    """Nothing is proposed that is just what was written."""
    text = TINY.replace("d_model = 32", "d_model = 32\nbatch = 2")
    with pytest.raises(
        SpecError, match=r"field `batch` - .*; this field belongs to `\$\.sizes\[...\]`"
    ):
        parse_toml(text.encode(), Experiment, "x.toml")
    text = "d_model = 4\n" + TINY
    with pytest.raises(SpecError, match=r"did you mean `sizes\[\.\.\.\]\.model\.d_model`\?"):
        parse_toml(text.encode(), Experiment, "x.toml")


def test_a_model_alone_is_no_experiment(tmp_path):
    """The refusal says how to make one of it, which works."""
    path = tmp_path / "model.toml"
    path.write_text(MODEL)
    with pytest.raises(SpecError, match="got only a model, which pympa footprint reads") as error:
        load_experiment(str(path))
    assert "d_model" not in str(error.value)
    head, rest = str(error.value).split("begin the file with ")[1].split(", [sizes.local] ")
    size = rest.split(", [sizes.local.model]")[0]
    title, _, plans = head.partition(", plans")
    lines = [*title.split(", "), f"plans{plans}", "[sizes.local]", *size.split(", ")]
    path.write_text("\n".join([*lines, "[sizes.local.model]", MODEL]))
    experiment = load_experiment(str(path))
    assert experiment.sizes["local"].model == parse_toml(MODEL.encode(), ModelSpec, "m.toml")
    assert experiment.plans[0].family == "ring"


@pytest.mark.parametrize("softcap", [0.0, -1.0, 1e-50, 7e-46, 2.9e-39, 1e6, 1e8])
def test_softcaps_that_float32_does_not_hold(softcap):
    with pytest.raises(SpecError, match=r"softcap: expected a number from 1\.18e-38 to 100000, or"):
        LayerSpec(heads=2, head_dim=4, mlp_hidden=8, softcap=softcap)


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
    with pytest.raises(SpecError, match="expected one of family and plan"):
        parse_toml(
            b'title="t"\ndtype="float32"\nsizes={}\nplans=[{role="x"}]', Experiment, "x.toml"
        )
