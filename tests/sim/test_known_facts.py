"""The simulator beside published results that it was not fitted to; see bench/known_facts.py.

The sources state no spread, so no test says how far from them a prediction may be. What is guarded
is what must hold whatever the spread (what lies between which limits), and that README.md prints
what the simulator gives today: a change of the simulator changes the table or fails here.
"""

import importlib.util
import re
import sys

import pytest

from support.jobs import ROOT
from support.lanes import FULL

PATH = ROOT / "bench" / "known_facts.py"


@pytest.fixture(scope="module")
def known():
    spec = importlib.util.spec_from_file_location("known_facts", PATH)
    module = sys.modules["known_facts"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def readme_row(name):
    """Return the published and the simulated figure of a row of README.md's table, as printed."""
    pattern = rf"^\| [^|]*{re.escape(name)}[^|]* \|(.*)\|$"
    (row,) = re.findall(pattern, (ROOT / "README.md").read_text(), re.M)
    published, simulated, _ = (cell.strip() for cell in row.split("|"))
    return published, simulated


@pytest.mark.parametrize(
    ("balance", "name"), [("contiguous", "naive ring over ideal"), ("zigzag", "the same, zigzag")]
)
def test_the_readme_prints_what_rings_reach(known, balance, name):
    shares = known.RING_PUBLISHED[balance], known.ring_share(balance)
    assert readme_row(name) == tuple(f"{100 * share:.1f} %" for share in shares)


def test_a_ring_is_between_one_that_hides_all_messages_and_one_that_hides_none(known):
    """Zigzag: the library's figure is, and so nothing but hiding need be told apart."""
    published = known.RING_PUBLISHED["zigzag"]
    assert known.unhidden_share() < published < known.ring_share("zigzag") < 1


def test_balance_pays_as_published(known):
    """The last rank of a contiguous ring sees all keys, and does nearly twice its share of work."""
    (rate,), ranks = known.h800().device.attention, known.RING_RANKS
    kernels_alone = ranks / 2 / rate.causal / ((ranks - 1) / rate.full + 0.5 / rate.causal)
    naive, zigzag = known.ring_share("contiguous"), known.ring_share("zigzag")
    assert naive < kernels_alone < zigzag
    assert known.RING_PUBLISHED["contiguous"] < kernels_alone < known.RING_PUBLISHED["zigzag"]


def test_whoever_merges_takes_longer(known):
    for balance in known.RING_PUBLISHED:
        assert known.ring_share(balance) < known.ring_share(balance, merges=False)


@FULL  # half a minute
def test_a_million_tokens_of_llama_405b(known):
    """Faster than theirs, whose clocks are slower, and slower than their flops at the peak."""
    found = known.llama_prediction()
    assert known.llama_at_peak_seconds() < found.step_seconds < known.LLAMA_PUBLISHED_SECONDS
    assert found.layers[1] == 126
    assert found.layers[0] < 10
    assert known.papers_clock() < 1
    printed = f"{known.LLAMA_PUBLISHED_SECONDS:.0f} s", f"{found.step_seconds:.1f} s"
    assert readme_row("1M tokens of Llama-3 405B") == printed
