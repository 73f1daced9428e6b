"""Text to token ids and back, by the tokenizers package, whatever file the vocabulary is from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import processors

from pympa.checkpoint.chat_template import ChatTemplates, Message
from pympa.checkpoint.foreign import refused

_MOST_ID = (1 << 32) - 1  # the package keeps ids in 32 bits


@dataclass(frozen=True)
class SpecialIds:
    """The ids of tokens that generation needs.

    Attributes:
        bos: the token that starts a text; None if the model has none.
        eos: the tokens that end a text or a turn, in the order of the files.
        pad: the token that fills rows; None if the model has none.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


class Tokenizer:
    """The tokenizer of a model.

    Args:
        backend: the tokenizer of the tokenizers package; it is owned from now on.
        special: the ids of special tokens.
        templates: the chat templates.
        where: the name of the file or directory for messages.

    Attributes:
        special: the ids of special tokens.
        vocabulary: the number of ids, added tokens included; a model may have more rows.
        add_bos: whether `encode` puts `special.bos` first.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: SpecialIds,
        templates: ChatTemplates,
        where: str,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._templates = templates
        self._where = where
        self.special = special
        self.vocabulary: int = backend.get_vocab_size(with_added_tokens=True)
        self.add_bos = special.bos is not None and self.encode("")[:1] == [special.bos]

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the ids of a text.

        Args:
            text: the text; names of special tokens in it become those tokens.
            special: whether to add the tokens that start (and end) a text. A text from `chat` has
                them already.

        Raises:
            RefusedError: the vocabulary has no token for a part of the text, or the text is not
                Unicode.
        """
        with refused(f"{self._where}: tokenizer: expected text that it can encode"):
            ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of ids; ids outside the vocabulary have none.

        Args:
            ids: the token ids.
            skip_special: whether special tokens are left out.

        Raises:
            RefusedError: an id is negative, or has more than 32 bits.
        """
        with refused(f"{self._where}: tokenizer: expected ids from 0 to {_MOST_ID}"):
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def chat(self, messages: Sequence[Message], **variables: Any) -> str:
        """Return the prompt for a conversation; see `ChatTemplates.render`.

        A template may read the clock, so one rank renders and tells the others.
        """
        return self._templates.render(messages, **variables)


def add_ends(backend: tokenizers.Tokenizer, bos: str | None = None, eos: str | None = None) -> None:
    """Let a tokenizer add tokens at the ends of a text, after what it does already.

    Args:
        backend: the tokenizer.
        bos: the token that starts a text.
        eos: the token that ends one.
    """
    ends = [token for token in (bos, eos) if token is not None]
    template = processors.TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        pair=None,
        special_tokens=[(token, backend.token_to_id(token)) for token in ends],
    )
    before = backend.post_processor
    backend.post_processor = processors.Sequence([before, template]) if before else template
