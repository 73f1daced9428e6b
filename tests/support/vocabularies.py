"""Small vocabularies, learned from a page of text, as tokenizer.json and as GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from gguf import TokenType
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

PAGE = [
    "The ring passes blocks of keys and values; each rank folds what it got into its own state.",
    "Who'd've thought that 12345 tokens fit? It's 3.14 times as many as we're used to.",
    "def fold(state, block):\n    # two spaces  here\n\treturn state + block  \n\n\n",
    "Größe, naïve, Ελληνικά, 日本語のテキスト, русский, camelCase and snake_case, HTTPServer.",
] * 3
TEXTS = [
    *PAGE,
    "",
    " ",
    "a",
    "  leading and trailing  ",
    "unseen: žluťoučký 🎉 kůň\u0301\r\nx\t\ty   z",
    "<|turn|>user\nHi there<|end|> and <think> so",
    "The The the THE tHe 1 12 123 1234 00012",
    "cafe\u0301 in two forms: café",
]
SPECIAL = ["<|start|>", "<|end|>", "<|turn|>"]
USER_DEFINED = ["<think>"]
SPACE = "\u2581"


def byte_level(expressions: list[str], *, whole_words: bool = False) -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokenizer that cuts text by expressions and adds <|start|>."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=whole_words))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(one), "isolated") for one in expressions),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        PAGE, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return with_special(made)


def sentencepiece(*, prefix: bool = True) -> tokenizers.Tokenizer:
    """Return a tokenizer as converters make of a SentencePiece model, with bytes."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = [normalizers.Replace(" ", SPACE)]
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), *spaces] if prefix else spaces
    )
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        [word for line in PAGE for word in line.split(" ")],
        trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, show_progress=False),
    )
    plain = json.loads(made.to_str())
    plain["added_tokens"] = []
    return with_special(tokenizers.Tokenizer.from_str(json.dumps(plain)))


def with_special(made: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer with special and user-defined tokens in its vocabulary."""
    plain = json.loads(made.to_str())
    vocabulary = plain["model"]["vocab"]
    for token in SPECIAL + USER_DEFINED:
        vocabulary[token] = len(vocabulary)
    made = tokenizers.Tokenizer.from_str(json.dumps(plain))
    made.add_special_tokens(
        [tokenizers.AddedToken(one, normalized=False, special=True) for one in SPECIAL]
    )
    made.add_tokens([tokenizers.AddedToken(one, normalized=False) for one in USER_DEFINED])
    made.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", vocabulary["<|start|>"])]
    )
    return made


def write_directory(directory: Path, made: tokenizers.Tokenizer, **config: Any) -> Path:
    """Write a tokenizer as a model directory has it."""
    made.save(str(directory / "tokenizer.json"))
    tokens = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": None}
    text = json.dumps(tokens | {"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    (directory / "tokenizer_config.json").write_text(text)
    return directory


def metadata(made: tokenizers.Tokenizer, kind: str, **fields: Any) -> dict[str, Any]:
    """Return a tokenizer as the metadata of a GGUF file has it."""
    model = json.loads(made.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    types = [_type_of(token) for token in tokens]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found: dict[str, Any] = {
        "model": kind,
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "bos_token_id": tokens.index("<|start|>"),
        "eos_token_id": tokens.index("<|end|>"),
        "add_bos_token": True,
    }
    if kind == "gpt2":
        found["merges"] = merges
    else:
        rank = {merge.replace(" ", ""): -float(n) for n, merge in reversed([*enumerate(merges)])}
        found["scores"] = np.array([rank.get(token, -1e6) for token in tokens], np.float32)
        found["unknown_token_id"] = tokens.index("<unk>")
    return {f"tokenizer.ggml.{name}": value for name, value in (found | fields).items()}


def _type_of(token: str) -> int:
    if token in SPECIAL:
        return int(TokenType.CONTROL)
    if token in USER_DEFINED:
        return int(TokenType.USER_DEFINED)
    if token == "<unk>":
        return int(TokenType.UNKNOWN)
    return int(TokenType.BYTE if token.startswith("<0x") else TokenType.NORMAL)
