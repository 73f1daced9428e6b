"""The tokenizer of a directory: tokenizer.json and the files beside it.

tokenizer.json says how text is cut and which tokens are added. tokenizer_config.json names the
special tokens (special_tokens_map.json does in older directories), generation_config.json the ids
that end a text, and chat templates have files of their own or lie in tokenizer_config.json. Which
file has the last word follows transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from pympa.checkpoint.chat_template import ChatTemplates
from pympa.checkpoint.foreign import refused
from pympa.checkpoint.json_file import read_bytes, read_json, text_of
from pympa.checkpoint.model_directory import optional_member
from pympa.checkpoint.tokenizer import SpecialIds, Tokenizer, add_ends
from pympa.errors import RefusedError
from pympa.text.escape import shown

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_OTHERS = ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model")
_MOST_SMALL_BYTES = 1 << 24  # of every file but the vocabulary
_MOST_EOS, _MOST_ID = 64, 1 << 31


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory has a tokenizer.json.

    Raises:
        RefusedError: the file is a link out of the directory.
    """
    return optional_member(directory, _TOKENIZER) is not None


def read_tokenizer(directory: Path) -> Tokenizer:
    """Read the tokenizer of a model directory.

    Args:
        directory: the directory.

    Raises:
        RefusedError: there is no tokenizer.json, or a file is broken or contradicts another one.
    """
    where = shown(str(directory))
    path = optional_member(directory, _TOKENIZER)
    if path is None:
        others = [name for name in _OTHERS if optional_member(directory, name)]
        raise RefusedError(
            f"{where}: expected {_TOKENIZER}; got {', '.join(others) or 'no tokenizer'}; write one "
            "with: python -c 'from transformers import AutoTokenizer as T; "
            'T.from_pretrained("OLD").save_pretrained("NEW")\''
        )
    text = read_bytes(path)
    with refused(f"{where}: {_TOKENIZER}: expected a tokenizer"):
        backend = tokenizers.Tokenizer.from_str(text.decode())
        _refuse_undefined_ends(backend)
    config = _optional(directory, _CONFIG)
    named = _named_tokens(directory, config)
    ids = {name: _id_of(backend, token) for name, token in named.items()}
    if config.get("add_bos_token") is True and ids.get("bos_token") is not None:
        _add_bos(backend, named["bos_token"], where)
    generation = _optional(directory, "generation_config.json") or _optional(
        directory, "config.json"
    )
    special = _special_ids(ids, generation, where)
    templates = ChatTemplates(_templates(directory, config, where), named, where)
    return Tokenizer(backend, special, templates, where)


def _optional(directory: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is no such file."""
    path = optional_member(directory, name)
    return {} if path is None else read_json(path, _MOST_SMALL_BYTES)


def _named_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens by the names that templates use, as in `bos_token`."""
    named = dict(config)
    if "added_tokens_decoder" not in config:
        named |= _optional(directory, "special_tokens_map.json")
    found = {}
    for name, token in named.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _id_of(backend: tokenizers.Tokenizer, token: str) -> int | None:
    """Return the id of a token, or None if it has none."""
    with refused(f"token {shown(token)}: expected Unicode"):
        found: int | None = backend.token_to_id(token)
    return found


def _refuse_undefined_ends(backend: tokenizers.Tokenizer) -> None:
    """Refuse a template of added tokens that names one without an id: the package would panic."""
    if backend.post_processor is None:
        return
    state = json.loads(backend.post_processor.__getstate__())
    for one in state.get("processors", [state]):
        pieces = [*one.get("single", ()), *one.get("pair", ())]
        named = {piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece}
        missing = sorted(named - one.get("special_tokens", {}).keys())
        if missing and one["type"] == "TemplateProcessing":
            raise ValueError(f"a post_processor without the token {missing[0]!r}")


def _add_bos(backend: tokenizers.Tokenizer, bos: str, where: str) -> None:
    """Add the first token, if tokenizer.json adds none by itself."""
    with refused(f"{where}: {_TOKENIZER}: expected a tokenizer"):
        if backend.num_special_tokens_to_add(False) == 0:
            add_ends(backend, bos)


def _special_ids(
    ids: Mapping[str, int | None], generation: Mapping[str, Any], where: str
) -> SpecialIds:
    """Return the ids for generation: of the tokenizer's tokens, then of its configuration."""
    declared = {
        name: _declared(generation, f"{name}_token_id", where) for name in ("bos", "eos", "pad")
    }
    found = {
        name: [
            *([own] if (own := ids.get(f"{name}_token")) is not None else []),
            *declared[name],
        ]
        for name in declared
    }
    bos, pad = (found[name][0] if found[name] else None for name in ("bos", "pad"))
    return SpecialIds(bos, tuple(dict.fromkeys(found["eos"])), pad)


def _declared(generation: Mapping[str, Any], name: str, where: str) -> list[int]:
    """Return the ids of a field that has one, several, or null."""
    value = generation.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if len(ids) > _MOST_EOS or not all(type(one) is int and 0 <= one < _MOST_ID for one in ids):
        raise RefusedError(
            f"{where}: {name}: expected a token id, or a list of at most {_MOST_EOS}"
        )
    return ids


def _templates(directory: Path, config: Mapping[str, Any], where: str) -> dict[str, str]:
    """Return the chat templates by name; a file of its own comes before the configuration."""
    path = optional_member(directory, "chat_template.jinja")
    if path is not None:
        with refused(f"{where}: {path.name}: expected UTF-8"):
            return {"default": read_bytes(path, _MOST_SMALL_BYTES).decode()}
    declared = config.get("chat_template")
    if not isinstance(declared, list):
        text = text_of(config, "chat_template", f"{where}: {_CONFIG}")
        return {} if text is None else {"default": text}
    found: dict[str, str] = {}
    for one in declared:
        one = one if isinstance(one, dict) else {}
        name, template = one.get("name"), one.get("template")
        if not isinstance(name, str) or not isinstance(template, str):
            raise RefusedError(
                f"{where}: {_CONFIG}: chat_template: expected a list of objects with name and "
                "template"
            )
        found[name] = template
    return found
