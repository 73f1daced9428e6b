"""The tokenizer of a GGUF file, which holds a vocabulary but no tokenizer.json.

Two kinds are known. "gpt2" is byte-level BPE: tokens in the alphabet of bytes, merges, and the name
of a rule that cuts text (`gguf_splits`). "llama" is the BPE of SentencePiece: any two neighbours
whose text is a token may merge, the best score first; from this follows a list of merges for the
tokenizers package. Gemma's scores do not give its order, positions in the vocabulary do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import tokenizers
from gguf import TokenType
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from pympa.checkpoint.chat_template import ChatTemplates
from pympa.checkpoint.foreign import refused
from pympa.checkpoint.gguf_splits import SPLITS
from pympa.checkpoint.tokenizer import SpecialIds, Tokenizer, add_ends
from pympa.errors import RefusedError
from pympa.text.escape import shown

T = TypeVar("T")
_PREFIX = "tokenizer.ggml."
_BYTE_LEVEL, _SENTENCEPIECE = "gpt2", "llama"  # values of tokenizer.ggml.model
_SPACE = "\u2581"  # SentencePiece writes a space so
_TEMPLATE = "tokenizer.chat_template"
_BY_POSITION = "gemma"  # architectures that start so
_LONGEST_TOKEN = 512  # characters; rebuilding merges takes the square of it
_TURN_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<|return|>", "<|call|>",
)  # fmt: skip
_END_OF_MESSAGE, _END_OF_ANSWER = "<|end|>", "<|return|>"


def gguf_tokenizer(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """Build the tokenizer of a GGUF file.

    Args:
        metadata: the metadata of the file.
        where: the name of the file for messages.

    Raises:
        RefusedError: the kind of the vocabulary, or its rule of cutting text, is not known, or
            fields are missing or contradict each other.
    """
    fields = _Fields(metadata, where)
    if fields.kind == _BYTE_LEVEL:
        backend, add_bos = _byte_level(fields)
    elif fields.kind == _SENTENCEPIECE:
        backend, add_bos = _sentencepiece(fields), True
    else:
        raise fields.wrong("model", "gpt2 (byte-level BPE) or llama (SentencePiece)", fields.kind)
    with refused(f"{where}: expected special tokens of a vocabulary"):
        backend.add_special_tokens(
            [AddedToken(t, normalized=False, special=True) for t in fields.of(TokenType.CONTROL)]
        )
        backend.add_tokens(
            [AddedToken(t, normalized=False) for t in fields.of(TokenType.USER_DEFINED)]
        )
    named = {
        f"{name}_token": fields.tokens[one]
        for name, field in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (one := fields.token_id(field)) is not None
    }
    add_bos = fields.get("add_bos_token", bool, add_bos)
    add_eos = fields.get("add_eos_token", bool, False)
    with refused(f"{where}: expected tokens that start and end a text"):
        add_ends(
            backend,
            named.get("bos_token") if add_bos else None,
            named.get("eos_token") if add_eos else None,
        )
    special = SpecialIds(fields.token_id("bos"), _ends(fields), fields.token_id("padding"))
    return Tokenizer(backend, special, ChatTemplates(_templates(fields), named, where), where)


class _Fields:
    """The fields of a vocabulary; none has another type, or another length, than it should."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self.metadata = metadata
        self.where = where
        self.kind = self.get("model", str, "")
        self.tokens = self.texts("tokens")
        self.types = self.numbers("token_type")
        if self.kind == _SENTENCEPIECE:
            self._respell_spaces()
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            raise self.wrong("tokens", "each token once", "one of them twice")
        if max(map(len, self.tokens), default=0) > _LONGEST_TOKEN:
            raise self.wrong("tokens", f"at most {_LONGEST_TOKEN} characters in one", "more")

    def wrong(self, name: str, expected: str, got: object) -> RefusedError:
        """Return the refusal of a field."""
        return RefusedError(
            f"{self.where}: {_PREFIX}{name}: expected {expected}; got {shown(str(got))}"
        )

    def get(self, name: str, kind: type[T], default: T) -> T:
        """Return a field of one value."""
        value = self.metadata.get(_PREFIX + name, default)
        if type(value) is not kind:
            raise self.wrong(name, f"a value of the type {kind.__name__}", type(value).__name__)
        return value

    def texts(self, name: str) -> list[str]:
        """Return a field of texts."""
        value = self.metadata.get(_PREFIX + name)
        if not isinstance(value, list):
            raise self.wrong(name, "a list of texts", "none" if value is None else "another value")
        return value

    def numbers(self, name: str) -> NDArray[np.float64]:
        """Return a field of one number for each token; zeros if it is missing."""
        value = self.metadata.get(_PREFIX + name, np.zeros(len(self.tokens)))
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            raise self.wrong(name, f"{len(self.tokens):,} numbers", "another value")
        with np.errstate(invalid="ignore"):  # NaN of a broken file
            return value.astype(np.float64)

    def of(self, kind: TokenType) -> list[str]:
        """Return the tokens of a type."""
        return [self.tokens[index] for index in np.flatnonzero(self.types == int(kind))]

    def token_id(self, name: str) -> int | None:
        """Return the id of a special token, or None."""
        value = self.metadata.get(f"{_PREFIX}{name}_token_id")
        if value is not None and not (type(value) is int and 0 <= value < len(self.tokens)):
            raise self.wrong(f"{name}_token_id", f"an id below {len(self.tokens):,}", value)
        return value

    def _respell_spaces(self) -> None:
        """Write tokens of several spaces as merges see them; files have plain spaces there."""
        runs = [
            index
            for index in np.flatnonzero(self.types == int(TokenType.USER_DEFINED)).tolist()
            if len(self.tokens[index]) > 1 and not self.tokens[index].strip(" ")
        ]
        self.types[runs] = int(TokenType.NORMAL)
        self.tokens = list(self.tokens)
        for index in runs:
            self.tokens[index] = _SPACE * len(self.tokens[index])


def _byte_level(fields: _Fields) -> tuple[tokenizers.Tokenizer, bool]:
    """Return a byte-level BPE tokenizer, and whether texts start with bos by default."""
    name = fields.get("pre", str, "")
    split = SPLITS.get(name)
    if split is None:
        known = ", ".join(SPLITS)
        raise fields.wrong("pre", f"one of {known}", name or "none, as in files of 2023")
    merges = _listed_merges(fields)
    with refused(f"{fields.where}: expected merges of its tokens"):
        model = models.BPE(vocab=fields.ids, merges=merges, ignore_merges=split.whole_words)
        backend = tokenizers.Tokenizer(model)
    if split.compose:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(one), "isolated") for one in split.expressions),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, split.add_bos


def _sentencepiece(fields: _Fields) -> tokenizers.Tokenizer:
    """Return a tokenizer for the BPE of SentencePiece, with bytes for unknown characters."""
    unknown = fields.token_id("unknown")
    listed = _PREFIX + "merges" in fields.metadata
    merges = _listed_merges(fields) if listed else _rebuilt_merges(fields)
    with refused(f"{fields.where}: expected a vocabulary of SentencePiece"):
        model = models.BPE(
            vocab=fields.ids,
            merges=merges,
            unk_token=None if unknown is None else fields.tokens[unknown],
            fuse_unk=True,
            byte_fallback=bool(fields.of(TokenType.BYTE)),
        )
        backend = tokenizers.Tokenizer(model)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("add_space_prefix", bool, True):
        spaces.insert(0, normalizers.Prepend(_SPACE))
        parts.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(parts)
    return backend


def _listed_merges(fields: _Fields) -> list[tuple[str, str]]:
    """Return the merges that a file lists, the first one before all others."""
    halves = (merge.partition(" ") for merge in fields.texts("merges"))
    return [(left, right) for left, _, right in halves]


def _rebuilt_merges(fields: _Fields) -> list[tuple[str, str]]:
    """Return the merges of a vocabulary that has scores only, the best first."""
    order = np.argsort(-fields.numbers("scores"), kind="stable")
    if str(fields.metadata.get("general.architecture")).startswith(_BY_POSITION):
        order = np.arange(len(fields.tokens))
    single = np.isin(fields.types, [TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE])
    ids, merges = fields.ids, []
    for index in order[~single[order]].tolist():
        token = fields.tokens[index]
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        found = [(ids[a], ids[b], a, b) for a, b in halves if a in ids and b in ids]
        merges += [(left, right) for _, _, left, right in sorted(found)]
    return merges


def _ends(fields: _Fields) -> tuple[int, ...]:
    """Return the ids that end a text or a turn: those of the file, then those of usual names."""
    declared = [fields.token_id(name) for name in ("eos", "eot", "eom")]
    control = set(fields.of(TokenType.CONTROL))
    names = [name for name in _TURN_ENDS if name in control]
    if _END_OF_MESSAGE in control and _END_OF_ANSWER not in control:
        names.append(_END_OF_MESSAGE)
    ids = [one for one in declared if one is not None] + [fields.ids[name] for name in names]
    return tuple(dict.fromkeys(ids))


def _templates(fields: _Fields) -> dict[str, str]:
    """Return the chat templates by name."""
    found = {}
    for key, value in fields.metadata.items():
        if key == _TEMPLATE or key.startswith(_TEMPLATE + "."):
            if not isinstance(value, str):
                raise RefusedError(f"{fields.where}: {shown(key)}: expected a text")
            found[key.removeprefix(_TEMPLATE).lstrip(".") or "default"] = value
    return found
