"""The instruction set of a job: what all hosts have, in whatever order the ranks come."""

import itertools

import pytest

from pympa.errors import RefusedError
from pympa.kernels.cpu import isa_of_profile, supported_isas
from pympa.session.instruction_set import agree_on_isa

SAPPHIRE_RAPIDS = ["amx_bf16", "avx512", "avx512_bf16", "avx2", "portable", "amx_emulated"]
NO_TILES = [isa for isa in SAPPHIRE_RAPIDS if isa != "amx_bf16"]
ZEN_4 = ["avx512_bf16", "avx512", "avx2", "portable", "amx_emulated"]
HASWELL = ["avx2", "portable", "amx_emulated"]
ARM = ["portable"]


@pytest.mark.parametrize(
    ("hosts", "chosen"),
    [
        ([SAPPHIRE_RAPIDS], "amx_bf16"),
        ([ZEN_4], "avx512_bf16"),
        ([NO_TILES], "avx512"),
        ([SAPPHIRE_RAPIDS, NO_TILES], "avx512"),
        ([SAPPHIRE_RAPIDS, ZEN_4], "avx512"),
        ([NO_TILES, ZEN_4, ZEN_4], "avx512"),
        ([ZEN_4, HASWELL], "avx2"),
        ([SAPPHIRE_RAPIDS, HASWELL, ZEN_4], "avx2"),
        ([HASWELL, ARM], "portable"),
        ([["cuda"]], "cuda"),
    ],
)
def test_what_all_hosts_have(hosts, chosen):
    names = [f"node{i}" for i in range(len(hosts))]
    for order in itertools.permutations(zip(hosts, names, strict=True)):
        isa, note = agree_on_isa(*zip(*order, strict=True), None)
        assert isa == chosen
        wishes = {offer[0] for offer in hosts}
        assert (note is None) == (wishes == {chosen})
        if note is not None:
            assert note.startswith(f"{chosen} on all hosts: ")
            assert all(wish in note for wish in wishes)


def test_the_note_says_who_lacks_what():
    _, note = agree_on_isa([SAPPHIRE_RAPIDS, ZEN_4], ["a", "b"], None)
    assert note == (
        "avx512 on all hosts: a would use amx_bf16, which b lacks; "
        "b would use avx512_bf16, which is slow on others"
    )


def test_what_the_user_asks_for():
    assert agree_on_isa([ZEN_4, ZEN_4], ["a", "b"], "amx_emulated") == ("amx_emulated", None)
    with pytest.raises(
        RefusedError, match=r"isa: expected one of avx2, portable, .*; got 'avx512'"
    ):
        agree_on_isa([ZEN_4, HASWELL], ["a", "b"], "avx512")


def test_workspaces_of_another_machine():
    here = supported_isas()
    assert isa_of_profile(None) == isa_of_profile("neon") == here[0]
    assert all(isa_of_profile(isa) == isa for isa in here)
    if "amx_emulated" in here:
        assert isa_of_profile("amx_bf16") in ("amx_bf16", "amx_emulated")
