"""Text becomes the ids that the tokenizer's own package gives it, from either kind of file."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from pympa.checkpoint.gguf_splits import SPLITS
from pympa.checkpoint.gguf_tokenizer import gguf_tokenizer
from pympa.checkpoint.tokenizer_files import read_tokenizer
from pympa.errors import RefusedError
from support.opened_files import load_tokenizer
from support.vocabularies import TEXTS, byte_level, metadata, sentencepiece, write_directory

LLAMA_3 = [*SPLITS["llama-bpe"].expressions]


@pytest.fixture(scope="module")
def bytes_of_llama():
    return byte_level(LLAMA_3, whole_words=True)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_of_a_directory(tmp_path, bytes_of_llama, text):
    tokenizer = load_tokenizer(write_directory(tmp_path, bytes_of_llama))
    assert tokenizer.encode(text) == bytes_of_llama.encode(text).ids
    assert tokenizer.encode(text)[1:] == tokenizer.encode(text, special=False)
    assert tokenizer.decode(tokenizer.encode(text, special=False), skip_special=False) == text
    assert tokenizer.decode(tokenizer.encode(text)) == bytes_of_llama.decode(
        bytes_of_llama.encode(text).ids
    )


def test_a_directory_as_transformers_reads_it(tmp_path, bytes_of_llama):
    transformers = pytest.importorskip("transformers", reason="transformers is the second opinion")
    write_directory(tmp_path, bytes_of_llama)
    other = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == other(text)["input_ids"]
    assert (ours.special.bos, ours.special.eos) == (other.bos_token_id, (other.eos_token_id,))


def test_ids_that_generation_needs(tmp_path, bytes_of_llama):
    start, end, turn = (bytes_of_llama.token_to_id(f"<|{name}|>") for name in
                        ("start", "end", "turn"))  # fmt: skip
    write_directory(tmp_path, bytes_of_llama, pad_token={"content": "<|turn|>"})
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    special = load_tokenizer(tmp_path).special
    assert (special.bos, special.eos, special.pad) == (start, (end, 7), turn)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, turn]}))
    assert load_tokenizer(tmp_path).special.eos == (end, turn)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<think>"}')
    assert load_tokenizer(tmp_path).special.eos[0] == bytes_of_llama.token_to_id("<think>")


@pytest.mark.parametrize("declared", [None, False, True])
def test_bos_is_added_by_tokenizer_json_or_else_by_its_configuration(tmp_path, declared):
    made = byte_level(LLAMA_3)
    config = {} if declared is None else {"add_bos_token": declared}
    tokenizer = read_tokenizer(write_directory(tmp_path, made, **config))
    assert tokenizer.add_bos
    assert tokenizer.encode("a") == [tokenizer.special.bos, *tokenizer.encode("a", special=False)]
    made.post_processor = None
    tokenizer = read_tokenizer(write_directory(tmp_path, made, **config))
    assert tokenizer.add_bos == bool(declared)


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "gpt-4o", "deepseek-v3", "starcoder"])
def test_byte_level_gguf_gives_the_ids_of_tokenizer_json(name):
    split = SPLITS[name]
    made = byte_level([*split.expressions], whole_words=split.whole_words)
    made.normalizer = normalizers.NFC() if name == "qwen2" else None
    ours = gguf_tokenizer(metadata(made, "gpt2", pre=name), "m.gguf")
    for text in TEXTS:
        assert ours.encode(text) == made.encode(text).ids
        assert ours.decode(ours.encode(text)) == made.decode(made.encode(text).ids)
    assert ours.vocabulary == made.get_vocab_size()


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gguf_gives_the_ids_of_tokenizer_json(prefix):
    made = sentencepiece(prefix=prefix)
    ours = gguf_tokenizer(metadata(made, "llama", add_space_prefix=prefix), "m.gguf")
    for text in TEXTS:
        assert ours.encode(text) == made.encode(text).ids
        assert ours.decode(ours.encode(text)) == made.decode(made.encode(text).ids)


def test_splits_are_those_of_transformers():
    module = pytest.importorskip(
        "transformers.integrations.gguf.gguf_tokenizer_mapping",
        reason="transformers is the second opinion",
    )
    others = module.GGUF_PRE_TOKENIZER_SPLITS
    common = sorted(set(others) & set(SPLITS))
    assert {"llama-bpe", "qwen2", "gpt-4o", "tekken", "dbrx"} <= set(common)
    for name in common:
        (expression,) = SPLITS[name].expressions
        ours, theirs = (pre_tokenizers.Split(Regex(one), "isolated")
                        for one in (expression, others[name]))  # fmt: skip
        for text in TEXTS:
            assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_a_gguf_file_that_is_named_has_its_own_tokenizer(tmp_path, bytes_of_llama):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    fields = metadata(bytes_of_llama, "gpt2", pre="llama-bpe")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(fields["tokenizer.ggml.tokens"])
    writer.add_token_types(fields["tokenizer.ggml.token_type"].tolist())
    writer.add_token_merges(fields["tokenizer.ggml.merges"])
    writer.add_bos_token_id(fields["tokenizer.ggml.bos_token_id"])
    writer.add_chat_template("{{ messages[0].content }}")
    writer.add_tensor("x", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    assert tokenizer.encode("The ring") == bytes_of_llama.encode("The ring").ids
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == "Hi"
    assert load_tokenizer(tmp_path).special == tokenizer.special


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"model": "t5"}, "model: expected gpt2 .* got t5"),
        ({"model": 3}, "model: expected a value of the type str"),
        ({"pre": "viking"}, "pre: expected one of llama3, .*; got viking"),
        ({"pre": ""}, "files of 2023"),
        ({"tokens": None}, "tokens: expected a list of texts; got none"),
        ({"tokens": ["a", "a"], "token_type": np.ones(2)}, "each token once"),
        ({"tokens": ["a" * 999], "token_type": np.ones(1)}, "at most 512 characters"),
        ({"token_type": np.ones(3)}, "token_type: expected .* numbers"),
        ({"merges": None}, "merges: expected a list of texts"),
        ({"merges": ["no such"]}, "expected merges of its tokens"),
        ({"merges": ["", "a", "a b c"]}, "expected merges of its tokens"),
        ({"bos_token_id": 1 << 40}, "bos_token_id: expected an id below"),
        ({"add_bos_token": 1}, "add_bos_token: expected a value of the type bool"),
        ({"eos_token_id": -1}, "eos_token_id: expected an id below"),
    ],
)
def test_a_broken_vocabulary_is_refused(bytes_of_llama, fields, why):
    with pytest.raises(RefusedError, match=why):
        gguf_tokenizer(metadata(bytes_of_llama, "gpt2", **{"pre": "qwen2"} | fields), "m.gguf")


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json: expected a tokenizer"),
        ("tokenizer.json", b'{"model": ' * 9999, "tokenizer.json: expected a tokenizer"),
        ("tokenizer.json", b"\xff", "tokenizer.json: expected a tokenizer"),
        ("tokenizer_config.json", b"[]", "expected a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template: expected a text"),
        ("tokenizer_config.json", b'{"chat_template": [3]}', "chat_template: expected a list"),
        ("generation_config.json", b'{"eos_token_id": [-1]}', "eos_token_id: expected a token id"),
        ("generation_config.json", b'{"pad_token_id": "x"}', "pad_token_id: expected a token id"),
        ("chat_template.jinja", b"\xff", "expected UTF-8"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, bytes_of_llama, name, text, why):
    write_directory(tmp_path, bytes_of_llama)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(RefusedError, match=why):
        load_tokenizer(tmp_path)


def test_a_template_of_tokens_without_ids_is_refused_before_the_package_panics(
    tmp_path, bytes_of_llama, capfd
):
    path = write_directory(tmp_path, bytes_of_llama) / "tokenizer.json"
    path.write_text(path.read_text().replace('"id": "<|start|>"', '"id": "<|other|>"', 1))
    with pytest.raises(RefusedError, match=r"without the token '<\|other\|>'"):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", None])
def test_a_directory_without_tokenizer_json_says_how_to_get_one(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(b"")
    if name:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(RefusedError, match=f"got {name or 'no tokenizer'}; write one with"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("ids", [[-1], [1 << 32], [1.5]])
def test_ids_that_are_none(tmp_path, bytes_of_llama, ids):
    tokenizer = load_tokenizer(write_directory(tmp_path, bytes_of_llama))
    with pytest.raises(RefusedError, match="expected ids from 0"):
        tokenizer.decode(ids)
    assert tokenizer.decode([1 << 31]) == ""


def test_text_that_is_not_unicode(tmp_path, bytes_of_llama):
    tokenizer = load_tokenizer(write_directory(tmp_path, bytes_of_llama))
    with pytest.raises(RefusedError, match="expected text that it can encode"):
        tokenizer.encode("\ud800")
