"""A user's own model on the command lines: a model directory, or a file with only a model."""

import json

import pytest

from support.jobs import run_job
from support.model_files import load_family, write_family

MODEL = """
d_model = 64
vocabulary = 256
[[layers]]
repeat = 3
heads = 4
head_dim = 16
mlp_hidden = 96
pattern = [{ window = 8 }, {}]
"""


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("name", "context"), [("gemma3", None), ("phi3", 40)])
def test_bench_of_a_directory(name, context, tmp_path):
    write_family(name, tmp_path / "model")
    out = tmp_path / "out.jsonl"
    job = run_job(
        2, "-m", "pympa.bench", str(tmp_path / "model"), "--plan", "tp=2", "--plan", "cp=2",
        "--tokens", "40", "--batch", "2", "--iterations", "1", "--output", str(out),
    )  # fmt: skip
    assert job.status == 0, job.err
    found = records(out)
    assert [record["plan"] for record in found] == ["cp=2", "tp=2"][::-1]
    for record in found:
        assert record["verified"]
        assert record["dtype"] == "float32"
        assert (record["batch"], record["tokens"]) == (2, 40)
        assert record["context"] == context
    again = run_job(
        2, "-m", "pympa.bench", str(tmp_path / "model"), "--plan", "tp=2", "--plan", "cp=2",
        "--tokens", "40", "--batch", "2", "--iterations", "1", "--output", str(out), "--resume",
    )  # fmt: skip
    assert again.status == 0, again.err
    assert len(records(out)) == 2


def test_bench_of_a_file_with_only_a_model(tmp_path):
    path = tmp_path / "model.toml"
    path.write_text(MODEL)
    job = run_job(2, "-m", "pympa.bench", str(path), "--plan", "cp=2", "--tokens", "30",
                  "--dtype", "bfloat16", "--iterations", "1")  # fmt: skip
    assert job.status == 0, job.err
    assert "cp=2 verified" in job.err


def test_a_directory_on_a_virtual_cluster_and_in_footprint(tmp_path):
    """config.json is enough."""
    write_family("deepseek_v3", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    job = run_job(1, "-m", "pympa.bench", str(tmp_path / "model"), "--plan", "tp=2,pp=2,dp=4,ep=4",
                  "--backend", "virtual", "--cluster", "dgx-h100x2", "--tokens", "64", "--batch",
                  "8")  # fmt: skip
    assert job.status == 0, job.err
    printed = run_job(1, "-m", "pympa", "footprint", str(tmp_path / "model"), "--plan", "tp=2")
    assert printed.status == 0, printed.err
    assert "fits this host" in printed.out


def change(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


WRONG = [
    ({}, ["--plan", "tp=9"], "needs 9 ranks; this run has 2"),
    ({}, [], "plans: expected at least one plan, or --plan; got none"),
    ({"alibi": True}, ["--plan", "tp=2"], "config.json: alibi: expected only fields that this"),
    ({"num_hidden_layers": 4}, ["--plan", "tp=2"], "layer_types: expected a list of 4 words"),
    (
        {"num_hidden_layers": 4, "layer_types": None},
        ["--plan", "tp=2"],
        "expected a tensor model.layers.3.",
    ),
    (
        {"num_hidden_layers": 2, "layer_types": None},
        ["--plan", "tp=2"],
        "got also model.layers.2.input_layernorm.weight",
    ),
    (
        {"num_hidden_layers": 2, "layer_types": None, "num_nextn_predict_layers": 1},
        ["--plan", "tp=2"],
        None,  # the layer more in the file is one that predicts more tokens
    ),
    ({"hidden_size": 32}, ["--plan", "tp=2"], "expected the shape [99, 32]; got [99, 64]"),
    ({"attention_bias": True}, ["--plan", "tp=2"], "q_proj.bias"),
    ({"dtype": "int8"}, ["--plan", "tp=2"], None),  # float32, as the library has it
    ({}, ["--plan", "tp=2", "--input", __file__], "expected a model with a tokenizer.json"),
]


@pytest.mark.parametrize(("fields", "options", "message"), WRONG)
def test_refusals_of_a_directory(fields, options, message, tmp_path):
    write_family("qwen3", tmp_path / "model")
    change(tmp_path / "model", **fields)
    job = run_job(2, "-m", "pympa.bench", str(tmp_path / "model"), "--tokens", "20",
                  "--iterations", "1", *options)  # fmt: skip
    assert "Traceback" not in job.err
    if message is None:
        assert job.status == 0, job.err
        return
    assert job.status != 0
    assert job.err.count(message) == 1, job.err
    assert job.seconds < 30


def test_a_field_may_be_ignored(tmp_path):
    write_family("qwen3", tmp_path / "model")
    change(tmp_path / "model", alibi=True)
    job = run_job(2, "-m", "pympa.bench", str(tmp_path / "model"), "--tokens", "20", "--plan",
                  "tp=2", "--iterations", "1", "--ignore-field", "alibi")  # fmt: skip
    assert job.status == 0, job.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ring-dense", "--tokens", "5"], "ring-dense: --tokens: expected none"),
        (["ring-dense", "--batch", "5"], "ring-dense: --batch: expected none"),
        (["/nowhere/at/all", "--plan", "tp=1"], "/nowhere/at/all"),
        ([".", "--plan", "tp=1"], "model.safetensors"),
    ],
)
def test_what_is_no_model(arguments, message, tmp_path):
    job = run_job(1, "-m", "pympa.bench", *arguments)
    assert job.status != 0
    assert message in job.err
    assert "Traceback" not in job.err


def test_a_text_becomes_tokens_of_the_model(tmp_path):
    """With a tokenizer.json the input is its ids; the digest of the job tells inputs apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    family = load_family("qwen3")
    assert family["config"]["vocab_size"] == 99
    write_family("qwen3", tmp_path / "model")
    words = {f"w{i}": i for i in range(98)} | {"[UNK]": 98}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("w1 w2 w3 and w97 " * 10)
    out = tmp_path / "out.jsonl"
    for more in ([], ["--input", str(tmp_path / "text.txt")]):
        job = run_job(
            1, "-m", "pympa.bench", str(tmp_path / "model"), "--plan", "tp=1", "--tokens", "20",
            "--iterations", "1", "--output", str(out), *more,
        )  # fmt: skip
        assert job.status == 0, job.err
    one, other = records(out)
    assert one["job"] != other["job"]
