"""The instruction set that all ranks agree on: results of another one have other bits."""

from __future__ import annotations

from collections.abc import Sequence

from pympa.errors import RefusedError

# Without amx_emulated, a model for tests: only for those who ask for it. GPUs have one kind.
_LOW_TO_HIGH = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16", "cuda")


def agree_on_isa(
    offers: Sequence[Sequence[str]], nodes: Sequence[str], asked: str | None
) -> tuple[str, str | None]:
    """Return the instruction set of a job, and why it is not the best one of some node.

    Of those that every rank has, it is the one that is best on the rank where it ranks lowest, and
    of two such the lower one. So the order of ranks does not matter, and what is slow on one host
    is avoided on all.

    Args:
        offers: what the host of each rank has, best first.
        nodes: the name of each rank's node.
        asked: the one that the user asks for, or None.

    Returns:
        The name, and a note, or None where all hosts would choose the same.

    Raises:
        RefusedError: not all ranks have the one that is asked for.
    """
    common = [isa for isa in offers[0] if all(isa in offer for offer in offers)]
    if asked is not None:
        if asked not in common:
            raise RefusedError(f"isa: expected one of {', '.join(common)}; got {asked!r}")
        return asked, None

    def places(isa: str) -> tuple[int, int]:
        return max(offer.index(isa) for offer in offers), _LOW_TO_HIGH.index(isa)

    chosen = min((isa for isa in common if isa in _LOW_TO_HIGH), key=places)
    wishes = {offer[0]: node for offer, node in zip(offers, nodes, strict=True)}
    reasons = [
        f"{wishes[wish]} would use {wish}, which "
        + (f"{lacking} lacks" if lacking else "is slow on others")
        for wish in sorted(wishes)
        if wish != chosen
        for lacking in [_first_without(wish, offers, nodes)]
    ]
    return chosen, f"{chosen} on all hosts: {'; '.join(reasons)}" if reasons else None


def _first_without(isa: str, offers: Sequence[Sequence[str]], nodes: Sequence[str]) -> str | None:
    lacking = (node for offer, node in zip(offers, nodes, strict=True) if isa not in offer)
    return next(lacking, None)
