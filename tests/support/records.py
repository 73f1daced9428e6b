"""Records as a run writes them, for tests of what reads and shows them."""

import msgspec

from pympa.bench.records.record import Record, by_rank, environment, spread


def make_record(**changes: object) -> Record:
    """Return a record of two ranks, with some fields changed."""
    record = Record(
        experiment="e", role="baseline", plan="tp=2", ranks=2, dtype="float32", size="local",
        batch=1, tokens=8, tps=100.0, tpot_ms=10.0, step_seconds=spread([0.08, 0.08, 0.08]),
        compute_seconds=by_rank([0.0]), comm_seconds=by_rank([0.0]), comm_fraction=None,
        bubble_fraction=None, bytes_sent=by_rank([0]), bytes_received=by_rank([0]),
        bytes_sent_by_axis={}, peak_bytes=by_rank([1]), process_peak_bytes=by_rank([1]),
        flops_per_token=1.0, roofline_fraction=0.5, oversubscribed=False, error=None,
        tolerance=None, error_of=None, error_one_rank=None, sampled_rows=None, verified=False,
        searched={}, published_tps=None, published_tpot_ms=None,
        environment=environment(cores=2, isa="avx2", threads=1, mpi="m"),
    )  # fmt: skip
    return msgspec.structs.replace(record, **changes)
