"""Published results that were not used to fit the simulator, beside its predictions.

Inputs are data sheets and published rates of single kernels; each has its source next to it.
Nothing here may be tuned to improve a prediction: NOTES explains the differences.

Run it: `python bench/known_facts.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from pympa.bench.experiment.description import Size
from pympa.costs.cluster import AttentionRate, Cluster, load_cluster
from pympa.costs.datasheet import DatasheetCosts
from pympa.kernels import AttentionSpec, KvBlock, State
from pympa.kernels.cpu import supported_isas
from pympa.parallel.ring import (
    RingBlocks,
    attend,
    fold_in_pieces,
    sent_round_the_ring,
)
from pympa.plan.accounting import step_flops, visible_pairs
from pympa.plan.layout import Balance, Layout, Range, split_tokens
from pympa.plan.mesh import Plan
from pympa.sim.predict import Prediction, predict
from pympa.sim.resources import virtual_resources
from pympa.sim.world import VirtualEndpoint, VirtualWorld
from pympa.spec import LayerSpec, ModelSpec, Rope

RING_TOKENS, RING_RANKS = 8192, 8
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
RING_CHANNELS = 16  # "16 p2p channels per peer": NCCL's log of 8 H800, NVIDIA/nccl#892
RING_PUBLISHED = {"contiguous": 0.521, "zigzag": 0.852}
LLAMA_TOKENS, LLAMA_PUBLISHED_SECONDS, LLAMA_PUBLISHED_UTILISATION = 1_000_000, 77.0, 0.63
PEAK_FLOPS = 989e12  # bfloat16 a second: NVIDIA's data sheet of the H100 SXM

# The papers' own text about their set-up, and what the simulator leaves out.
NOTES = """\
Ring against ideal (ring-flash-attention, README): 8 x H800, forward, bfloat16, heads of
Llama-3.1-8B, 8,192 tokens on each GPU; ideal is its single-GPU kernel on an eighth of the work, at
591.5 / 8 iterations a second. That kernel is FlashAttention-2: 325 TFLOP/s causal follow from the
591.5, and 35 % of the peak without a mask is from the abstract of FlashAttention-3 (arXiv
2407.08608). H800: an H100 with 400 GB/s of NVLink; the part of it that messages reach is the
H100's. That library writes each block's output, reads it as float32 and merges it (its utils.py),
which is done here, too; pympa's own ring carries the state and merges nothing. NCCL's channels keep
a multiprocessor each from the attention beside them: 16 of 132 (its log on 8 H800, NVIDIA/nccl#892,
and #689). That was added after the first comparison had shown 94 % for the zigzag ring, from these
sources and from nothing measured here. Left out: launches from Python. In the naive ring the last
rank computes without waiting for anybody, so that costs little; in the zigzag ring every step ends
with all ranks, and the published figure is about what hiding nothing would give.

1M tokens of Llama-3 405B (arXiv 2411.01783): 128 H100 in 16 nodes, ring of 16 over nodes that
passes K/V, tp=8 inside, one sequence. Our H100 is the 700 W board of the data sheet. Theirs reach
63 % of their peak at 77 s: the flops of the model then say that they count about 800 TFLOP/s for
it, less than the 989 of the data sheet, so theirs run slower clocks. The second line scales every
rate of ours by that. It takes the 77 s into account, so it compares their 63 % of the peak with our
share of it, and is no second prediction of seconds. Left out: 8-bit feed-forward weights, without
which the model does not fit; their adapters of 400 Gb/s are taken to be those of the DGX.
"""


@dataclass(frozen=True)
class Fact:
    """One published figure and its prediction.

    Neither source states a spread, so there is no limit for the error of a prediction.

    Attributes:
        name: the name of the figure.
        published: the published figure.
        predicted: the simulator's figure.
    """

    name: str
    published: float
    predicted: float

    @property
    def off_by(self) -> float:
        """The predicted minus the published figure, over the published one."""
        return self.predicted / self.published - 1


def h800() -> Cluster:
    """Return 8 H800 with the attention kernel of the library that was measured."""
    base = load_cluster("dgx-h100x2")
    nvlink = base.links[0]
    flops = 2 * RING_TOKENS * (RING_TOKENS + 1) / 2 * HEADS * 2 * HEAD_DIM
    rate = AttentionRate(head_dim=HEAD_DIM, full=0.35 * PEAK_FLOPS, causal=591.5 * flops)
    halved = msgspec.structs.replace(
        nvlink,
        bytes_per_second=nvlink.bytes_per_second * 400 / 900,
        ranks=RING_RANKS,
        processors=RING_CHANNELS,
    )
    device = msgspec.structs.replace(base.device, name="H800", attention=(rate,))
    return Cluster(title="8 x H800", ranks=RING_RANKS, device=device, links=(halved,))


def ring_share(balance: Balance, *, merges: bool = True) -> float:
    """Return the speed of ring attention over that of the kernel on an eighth of the work.

    Args:
        balance: the order of tokens; contiguous is the library's naive ring.
        merges: whether each block has its own output, which is merged afterwards, as in that
            library.
    """
    cluster = h800()
    costs = DatasheetCosts(cluster.device, "bfloat16")
    whole = Layout((Range(0, 0, RING_RANKS * RING_TOKENS),))
    layouts = split_tokens(whole, RING_RANKS, balance)
    rule = AttentionSpec(
        kv_head_of_q=np.arange(HEADS, dtype=np.int32) // (HEADS // KV_HEADS),
        scale=HEAD_DIM**-0.5,
        causal=True,
    )

    def body(endpoint: VirtualEndpoint) -> float:
        resources = virtual_resources(endpoint, Plan(cp=RING_RANKS), costs, isa=supported_isas()[0])
        arena, kernels, dtype = resources.arena, resources.kernels, np.dtype(np.float16)
        rows = layouts[endpoint.rank].rows

        def empty_state(rows: int) -> State:
            row_max, row_sum = (arena.empty((rows, HEADS), np.float32) for _ in range(2))
            return State(row_max, row_sum, arena.empty((rows, HEADS, HEAD_DIM), np.float32))

        def merge(held: KvBlock) -> None:
            """Do what the library does with one block: see its utils.py and zigzag file."""
            seeing = [
                piece
                for piece in q_layout.ranges
                if visible_pairs(Layout((piece,)), held.layout, True, None)
            ]
            if not seeing:
                return
            own_rows = Layout(tuple(seeing))  # all queries, or the later half
            first = q_layout.rows - own_rows.rows
            with arena.scope():
                block = empty_state(own_rows.rows)
                kernels.attend_block(q[first:], own_rows, held, block, rule)
                # Reading it as float32 takes as long as this.
                o = arena.empty(block.out.shape, dtype)
                kernels.finish(block, o, arena.empty(block.row_max.shape, np.float32))
                if held.layout != q_layout:
                    kernels.merge(state.rows(first, q_layout.rows), block)
                if first:
                    kernels.copy(block.out, block.out)  # the half is copied back

        own = KvBlock(
            arena.empty((rows, KV_HEADS, HEAD_DIM), dtype),
            arena.empty((rows, KV_HEADS, HEAD_DIM), dtype),
            layouts[endpoint.rank],
        )
        state, q_layout = empty_state(rows), layouts[endpoint.rank]
        q = arena.empty((rows, HEADS, HEAD_DIM), dtype)
        transport = resources.transports["ring"]
        ring = RingBlocks(transport, arena, own, layouts, layouts, rule)

        def fold(held: KvBlock) -> None:
            fold_in_pieces(kernels, transport, q, q_layout, held, rule, state)

        attend(kernels, ring, sent_round_the_ring, merge if merges else fold, state)
        kernels.finish(
            state,
            arena.empty(state.out.shape, dtype),
            arena.empty(state.row_max.shape, np.float32),
        )
        return endpoint.clock()

    seconds = max(VirtualWorld(RING_RANKS, cluster).run(body))
    ideal = RING_RANKS / 591.5
    return ideal / seconds


def unhidden_share() -> float:
    """Return `ring_share("zigzag")` if every block arrived before the next kernel started."""
    link = h800().links[0]
    block_bytes = 2 * RING_TOKENS * KV_HEADS * HEAD_DIM * 2
    each = link.latency_seconds + block_bytes / link.bytes_per_second
    return 1 / (1 / ring_share("zigzag") + (RING_RANKS - 1) * each * 591.5 / RING_RANKS)


def llama_405b() -> Size:
    """Return one sequence of a million tokens through Llama-3 405B (its model card)."""
    layer = LayerSpec(
        repeat=126,
        heads=128,
        kv_heads=8,
        head_dim=128,
        mlp_hidden=53248,
        gated=True,
        activation="silu",
        rope=Rope(theta=500_000.0),
    )
    model = ModelSpec(d_model=16384, vocabulary=128256, layers=(layer,))
    return Size(model=model, batch=1, tokens=LLAMA_TOKENS)


def llama_prediction(clock: float = 1.0) -> Prediction:
    """Return the prediction of the prefill, with all rates of the GPU times `clock`."""
    cluster = load_cluster("dgx-h100x128")
    device = cluster.device
    slower = msgspec.structs.replace(
        device,
        flops_per_second={name: clock * rate for name, rate in device.flops_per_second.items()},
        attention=tuple(
            msgspec.structs.replace(rate, full=clock * rate.full, causal=clock * rate.causal)
            for rate in device.attention
        ),
    )
    cluster = msgspec.structs.replace(cluster, device=slower)
    size = llama_405b()
    return predict(size.model, size.lengths, Plan(cp=16, tp=8), "bfloat16", cluster)


def llama_at_peak_seconds() -> float:
    """Return the seconds of the flops at the data sheet's peak: no prediction may be below."""
    size = llama_405b()
    return step_flops(size.model, size.lengths) / 128 / PEAK_FLOPS


def papers_clock() -> float:
    """Return the peak that the paper assumes over that of the data sheet."""
    return llama_at_peak_seconds() / LLAMA_PUBLISHED_SECONDS / LLAMA_PUBLISHED_UTILISATION


def facts() -> list[Fact]:
    """Return all facts."""
    found = []
    for balance, name in (("contiguous", "naive"), ("zigzag", "zigzag")):
        share, published = ring_share(balance), RING_PUBLISHED[balance]  # type: ignore[arg-type]
        found.append(Fact(f"{name} ring over ideal, 8 x H800", published, share))
    for clock, what in ((1.0, "data sheet's H100"), (papers_clock(), "paper's own peak")):
        seconds = llama_prediction(clock).step_seconds
        name = f"Llama-3 405B, 1M tokens, 128 H100 ({what}), s"
        found.append(Fact(name, LLAMA_PUBLISHED_SECONDS, seconds))
    return found


def main() -> None:
    """Print all facts with their notes."""
    print(f"{'':58}{'published':>10}{'simulated':>10}{'off by':>10}")
    for fact in facts():
        print(f"{fact.name:58}{fact.published:10.3g}{fact.predicted:10.3g}{fact.off_by:+10.1%}")
    bare = [ring_share(balance, merges=False) for balance in ("contiguous", "zigzag")]
    print(f"pympa's own ring, which merges nothing: naive {bare[0]:.3f}, zigzag {bare[1]:.3f}")
    print(f"the library's zigzag ring, if it hid no message: {unhidden_share():.3f}\n")
    print(NOTES, end="")


if __name__ == "__main__":
    main()
