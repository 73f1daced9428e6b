"""The scaling of RoPE in GGUF files: by keys of the metadata, or by tensors with divisors."""

from __future__ import annotations

from pympa.checkpoint.gguf_fields import Fields, Keys
from pympa.checkpoint.gguf_file import GgufFile
from pympa.errors import RefusedError
from pympa.spec import LongRopeScaling

FREQUENCIES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""The tensors with a divisor for each pair that RoPE rotates."""

_AT = "rope.scaling."
_TYPE, _FACTOR, _ATTENTION = f"{_AT}type", f"{_AT}factor", f"{_AT}attn_factor"
_TRAINED = f"{_AT}original_context_length"
_YARN = {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "attn_factor": "attention_factor"}


def scaling_fields(
    keys: Keys, file: GgufFile, *, by_keys: tuple[str, ...], by_tensors: bool
) -> Fields | None:
    """Return `rope_scaling` as config.json has it; None without scaling, or if it is in tensors.

    Args:
        keys: the keys of the architecture.
        file: the GGUF file, whose tensors may have divisors of RoPE.
        by_keys: the types of scaling by keys alone that the architecture may have.
        by_tensors: whether it may have tensors with divisors.

    Raises:
        RefusedError: a key is not allowed, or contradicts another one or the tensors.
    """
    found = {name for name in FREQUENCIES if name in file.stored}
    if found not in (set(), {FREQUENCIES[0]}, {*FREQUENCIES[1:]}) or (found and not by_tensors):
        expected = f"{FREQUENCIES[0]} alone, or both of {' and '.join(FREQUENCIES[1:])}"
        raise RefusedError(
            f"{file.where}: tensor {min(found)}: expected "
            f"{expected if by_tensors else 'none with divisors of RoPE in this architecture'}"
        )
    long = FREQUENCIES[1] in found
    with_tensors = ("longrope",) if long else ("llama3",)
    allowed = ("none", *(with_tensors if found else by_keys))
    keys.flag(f"{_AT}finetuned", False)
    keys.optional_size(_TRAINED)
    factor = keys.optional_number(_FACTOR)
    kind = "linear" if factor not in (None, 0.0, 1.0) and "linear" in allowed else "none"
    if keys.has(_TYPE):  # without a type llama.cpp takes linear, and divides by the factor
        kind = keys.choice(_TYPE, {word: word for word in allowed})
    if long and keys.has(_ATTENTION):
        keys.positive(_ATTENTION)
    else:
        keys.number_of(_ATTENTION, 1.0, why="or tensors with the divisors of longrope")
    if kind not in by_keys:
        keys.number_of(_FACTOR, 1.0, 0.0, why=f"as {_TYPE} is {kind}")
        return None
    table: Fields = {"rope_type": kind, "factor": keys.positive(_FACTOR)}
    if kind == "yarn":
        table["original_max_position_embeddings"] = _trained(keys)
        for name, field in _YARN.items():
            if keys.has(f"{_AT}yarn_{name}"):
                table[field] = keys.positive(f"{_AT}yarn_{name}")
        why = "as other mixes of both frequencies are not known"
        keys.number_of(f"{_AT}yarn_ext_factor", 1.0, -1.0, why=why)
    return table


def stored_scaling(keys: Keys, file: GgufFile, rotated: int) -> LongRopeScaling | None:
    """Return the scaling whose divisors are tensors: of Llama 3, or longrope; None without them.

    Args:
        keys: the keys of the architecture.
        file: the GGUF file with the tensors.
        rotated: the number of dimensions of a head that rotate.

    Raises:
        RefusedError: there is not one divisor for each pair of dimensions.
    """
    found = {name: _divisors(file, name) for name in FREQUENCIES if name in file.stored}
    for name, divisors in found.items():
        if len(divisors) != rotated // 2:
            raise keys.wrong(
                "rope.dimension_count", f"twice the {len(divisors)} numbers of {name}", rotated
            )
    if not found:
        return None
    plain = found.get(FREQUENCIES[0], ())
    return LongRopeScaling(
        short=found.get(FREQUENCIES[2], plain),
        long=found.get(FREQUENCIES[1], plain),
        trained_context=_trained(keys),
        attention_factor=1.0 if plain else keys.optional_number(_ATTENTION),
    )


def _trained(keys: Keys) -> int:
    return keys.optional_size(_TRAINED) or keys.size("context_length")


def _divisors(file: GgufFile, name: str) -> tuple[float, ...]:
    return tuple(float(value) for value in file.read(name).reshape(-1))
