"""The fields of a model's config.json, each read once with its type.

A field that nothing has read may change the mathematics. So it is refused by name, unless it is
known not to (`IGNORED`) or its value is the one that stands for "off".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from pympa.errors import RefusedError
from pympa.text.escape import shown

T = TypeVar("T")
_LONGEST = 60  # characters of a value in a message
_IGNORED = """
    _attn_implementation add_cross_attention architectures attention_dropout attn_implementation
    auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens boi_token_index bos_token_id
    cache_implementation chunk_size_feed_forward classifier_dropout cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eoi_token_index eos_token_id ep_size experts_implementation
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout hidden_dropout_prob id2label image_token_index
    initial_context_length initializer_range is_decoder is_encoder_decoder label2id length_penalty
    license max_length max_position_embeddings max_window_layers min_length mm_tokens_per_image
    model_max_length model_type no_repeat_ngram_size num_beam_groups num_beams num_mtp_layers
    num_nextn_predict_layers num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    router_aux_loss_coef router_jitter_noise sep_token_id seq_aux suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache vision_config
"""
IGNORED = frozenset(_IGNORED.split())
"""Fields that change nothing in the logits of a text: training, generation, housekeeping."""
_OFF: tuple[Any, ...] = (None, False, 0, 0.0, "", [], {})


class Config:
    """The fields of a configuration.

    Args:
        values: the fields.
        where: the name of the file, for messages.
        defaults: the values of fields that are not there, as the family's own code has them.
        path: the path of a table in the file, as in "rope_scaling.".
        allowed: the names of unknown fields to go on without, in the table or with its path.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        defaults: Mapping[str, Any] | None = None,
        path: str = "",
        allowed: Collection[str] = (),
    ) -> None:
        self.where = where
        self._values, self._defaults = values, dict(defaults or {})
        self._path, self._allowed = path, frozenset(allowed)
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Return whether a field is there and not null."""
        return self._values.get(name) is not None

    def first(self, *names: str) -> str:
        """Return the first name that is there, of several for the same thing, or the first one."""
        return next((name for name in names if self.has(name)), names[0])

    def size(self, name: str) -> int:
        """Return a positive whole number."""
        return int(self._checked(name, _is_size, "a positive whole number"))

    def optional_size(self, name: str) -> int | None:
        """Return a positive whole number, or None for null, 0 or a missing field."""
        value = self._checked(
            name, lambda v: v in (None, 0) or _is_size(v), "a positive whole number or null", None
        )
        return value or None

    def count(self, name: str) -> int:
        """Return a whole number of at least 0."""
        value = self._checked(name, lambda v: type(v) is int and v >= 0, "a whole number")
        return int(value)

    def number(self, name: str) -> float:
        """Return a number."""
        return float(self._checked(name, _is_number, "a number"))

    def positive(self, name: str) -> float:
        """Return a number above 0."""
        return float(self._checked(name, lambda v: _is_number(v) and v > 0, "a positive number"))

    def optional_number(self, name: str) -> float | None:
        """Return a number, or None for null or a missing field."""
        value = self._checked(name, lambda v: v is None or _is_number(v), "a number or null", None)
        return None if value is None else float(value)

    def flag(self, name: str, missing: Any = ...) -> bool:
        """Return true or false; null is false.

        Args:
            name: the name of the field.
            missing: the value of a missing field that the family has no default for.
        """
        return bool(
            self._checked(
                name, lambda v: v is None or isinstance(v, bool), "true or false", missing
            )
        )

    def choice(self, name: str, allowed: Mapping[str, T]) -> T:
        """Return what a word stands for."""
        words = ", ".join(allowed)
        word = self._checked(name, lambda v: isinstance(v, str) and v in allowed, f"one of {words}")
        return allowed[word]

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return a list of numbers."""
        found = self._checked(
            name, lambda v: isinstance(v, list) and all(map(_is_number, v)), "a list of numbers"
        )
        return tuple(map(float, found))

    def sizes(self, name: str) -> tuple[int, ...]:
        """Return a list of whole numbers; null is an empty one."""
        found = self._checked(
            name,
            lambda v: v is None or (isinstance(v, list) and all(type(n) is int for n in v)),
            "a list of whole numbers",
            None,
        )
        return tuple(found or ())

    def words(self, name: str, count: int, allowed: Iterable[str]) -> tuple[str, ...] | None:
        """Return a list of words, or None for null or a missing field."""
        choices = set(allowed)
        found = self._checked(
            name,
            lambda v: (
                v is None
                or (
                    isinstance(v, list)
                    and len(v) == count
                    and all(isinstance(word, str) and word in choices for word in v)
                )
            ),
            f"a list of {count} words out of {', '.join(sorted(choices))}",
            None,
        )
        return None if found is None else tuple(found)

    def table(self, name: str) -> Config | None:
        """Return the fields of a table, or None for null or a missing field."""
        found = self._checked(
            name, lambda v: v is None or isinstance(v, dict), "a table of fields", None
        )
        if found is None:
            return None
        return Config(found, self.where, path=f"{self._path}{name}.", allowed=self._allowed)

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuse a field with another value; it may be missing."""
        words = " or ".join(str(value).lower() for value in allowed)
        if name in self._values:
            self._checked(name, lambda value: _is_one_of(value, allowed), words)

    def same(self, *names: str) -> bool:
        """Return whether fields have the same value."""
        return all(self._values.get(name) == self._values.get(names[0]) for name in names)

    def skip(self, *names: str) -> None:
        """Count fields as read: others that were read say the same."""
        self._read.update(names)

    def wrong(self, name: str, expected: str, value: Any) -> RefusedError:
        """Return the refusal of a field's value."""
        text = shown(repr(value))
        if len(text) > _LONGEST:
            text = text[:_LONGEST] + "..."
        return RefusedError(f"{self.where}: {self._path}{name}: expected {expected}; got {text}")

    def finish(self) -> list[str]:
        """Refuse fields that nothing has read, and return those that are ignored.

        Raises:
            RefusedError: there is a field that may change the mathematics.
        """
        ignored, unknown = [], []
        for name, value in self._values.items():
            if name in self._read or name.startswith("_"):
                continue
            if name in IGNORED or not self._allowed.isdisjoint({name, self._path + name}):
                ignored.append(self._path + name)
            elif not _is_one_of(value, _OFF):
                unknown.append(self._path + name)
        if unknown:
            names = ", ".join(map(shown, unknown[:8]))
            raise RefusedError(
                f"{self.where}: {names}: expected only fields that this version knows, because "
                "others may change the mathematics; to go on without them, name them in "
                f"ignore_fields or --ignore-field {shown(unknown[0])}"
            )
        return ignored

    def _checked(
        self, name: str, allows: Callable[[Any], bool], expected: str, missing: Any = ...
    ) -> Any:
        """Return a field's value, or its default."""
        self._read.add(name)
        value = self._values.get(name, self._defaults.get(name, missing))
        if value is ...:
            raise RefusedError(
                f"{self.where}: {self._path}{name}: expected {expected}; the field is missing"
            )
        if not allows(value):
            raise self.wrong(name, expected, value)
        return value


def _is_one_of(value: Any, others: Iterable[Any]) -> bool:
    """Return whether a value equals one of others, of its type: false is not 0."""
    return any(value == other and type(value) is type(other) for other in others)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and value == value
