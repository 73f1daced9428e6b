"""How byte-level vocabularies in GGUF files cut text before merges, by `tokenizer.ggml.pre`.

A GGUF file names the rule instead of holding it. These are the expressions of the tokenizer.json
that each name stands for (llama.cpp, src/llama-vocab.cpp, has the list of names).
"""

from __future__ import annotations

from dataclasses import dataclass

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"  # one character that sticks to the word after it


def _words(digits: str) -> str:
    """Return the expression of words with endings, and of digits in groups."""
    signs = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return rf"{_ENDINGS}|{_BEFORE}\p{{L}}+|\p{{N}}{digits}|{signs}|{_SPACES}"


def _cased(digits: str, endings: str) -> str:
    """Return the expression that also cuts before capital letters inside a word."""
    signs = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    return (
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{endings}|{_BEFORE}{_UPPER}+{_LOWER}*{endings}"
        rf"|\p{{N}}{digits}|{signs}|{_SPACES}"
    )


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_2 = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _CJK,
    _DIGIT,
)
_DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _SPACES,
)


@dataclass(frozen=True)
class Split:
    """How a vocabulary cuts text.

    Attributes:
        expressions: the regular expressions, each applied to the pieces of the one before.
        compose: whether text is brought to Unicode's composed form (NFC) before.
        whole_words: whether a piece that is a token is taken without merges.
        add_bos: whether a text starts with the bos token, if the file does not say.
    """

    expressions: tuple[str, ...]
    compose: bool = False
    whole_words: bool = False
    add_bos: bool = False


_LLAMA_3 = Split((_words("{1,3}"),), whole_words=True, add_bos=True)
_QWEN_2 = Split((_words(""),), compose=True)
_PLAIN, _BY_DIGIT = Split((_GPT2,)), Split((_DIGIT, _GPT2))
_GPT_4O = Split((_cased("{1,3}", f"{_ENDINGS}?"),))
SPLITS = {
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "llama-bpe": _LLAMA_3,
    "dbrx": Split((_words("{1,3}"),)),
    "smaug-bpe": Split((_words("{1,3}"),)),
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
    "gpt-4o": _GPT_4O,
    "tekken": Split((_cased("", ""),), whole_words=True, add_bos=True),
    "gpt-2": _PLAIN,
    "olmo": _PLAIN,
    "mpt": _PLAIN,
    "starcoder": _BY_DIGIT,
    "smollm": _BY_DIGIT,
    "command-r": _BY_DIGIT,
    "refact": _BY_DIGIT,
    "deepseek-llm": Split(_DEEPSEEK_2),
    "deepseek-v3": Split(_DEEPSEEK_3),
}
"""The rules by their names in GGUF files."""
