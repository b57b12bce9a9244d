"""What is counted of a run, real or simulated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from benchmarks.cluster_simulation.replica import SOURCE, Job
from benchmarks.measure import digits, percentile

__all__ = ["TIERS", "of_jobs"]

TIERS = ("device", "host", "disk", SOURCE)


def of_jobs(jobs: Sequence[Job]) -> dict[str, float]:
    """Shares of the tiers, TTFT and throughput of the jobs that are done."""
    done = [job for job in jobs if job.fate == "done"]
    ttft = [1e3 * job.ttft for job in done]
    tiers = Counter(job.tier for job in done)
    seconds = max(job.end for job in done) - min(job.arrival for job in done)
    return {
        **{f"found_{tier}": digits(tiers[tier] / len(done)) for tier in TIERS},
        "ttft_ms_p50": digits(percentile(ttft, 50)),
        "ttft_ms_p99": digits(percentile(ttft, 99)),
        "ttft_ms_mean": digits(sum(ttft) / len(ttft)),
        "output_tokens_per_second": digits(sum(job.new_tokens for job in done) / seconds),
    }
