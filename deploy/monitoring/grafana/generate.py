"""Write the Grafana dashboard: ``python deploy/monitoring/grafana/generate.py [--check]``.

``lorax.json`` is what is imported; this is what is edited. With ``--check`` nothing is written, and
the exit code is 1 if the file is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("lorax.json")
WIDTH, HEIGHT, PER_LINE = 8, 8, 3
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# In place of SEL, so that the queries below stay readable.
SELECTOR = 'job=~"$job", instance=~"$instance"'


class Panel(NamedTuple):
    """A graph.

    Attributes:
        queries: PromQL by legend; ``SEL`` is the choice of job and instance, ``RANGE`` a range that
            holds several scrapes.
        unit: as Grafana calls it.
        most: the axis' end, where it is known.
    """

    title: str
    about: str
    queries: dict[str, str]
    unit: str = "short"
    most: float | None = None


def _percentiles(metric: str) -> dict[str, str]:
    rates = f"sum by (le) (rate({metric}_bucket{{SEL}}[RANGE]))"
    return {f"p{q}": f"histogram_quantile(0.{q}, {rates})" for q in (50, 90, 99)}


def _sum(metric: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} ({metric}{{SEL}})"


def _rate(metric: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{SEL}}[RANGE]))"


ROWS: dict[str, list[Panel]] = {
    "Traffic": [
        Panel(
            "Requests",
            "Admitted requests that ended, by why they ended.",
            {"{{stop_reason}}": _rate("lorax_requests_total", "stop_reason")},
            "reqps",
        ),
        Panel(
            "Errors by code",
            "Calls answered with an error status. RESOURCE_EXHAUSTED is overload.",
            {"{{code}}": _rate("lorax_errors_total", "code")},
            "reqps",
        ),
        Panel(
            "Replicas",
            "Those that let calls in, and those that Prometheus cannot reach.",
            {
                "serving": _sum("lorax_serving"),
                "down": "count(up{SEL} == 0) or vector(0)",
            },
        ),
    ],
    "Latency": [
        Panel(
            "Time to first token",
            "From admission; the target is 99 % within 2.5 s.",
            _percentiles("lorax_time_to_first_token_seconds"),
            "s",
        ),
        Panel(
            "Inter-token latency",
            "From one token to the next; the target is 99 % within 0.25 s.",
            _percentiles("lorax_inter_token_latency_seconds"),
            "s",
        ),
        Panel(
            "Missed targets",
            "Share of tokens that came too late, by target. 1 % is what the objective allows.",
            {
                "{{slo}}, 5 min": 'lorax:slo_missed:ratio5m{job=~"$job"}',
                "{{slo}}, 1 h": 'lorax:slo_missed:ratio1h{job=~"$job"}',
            },
            "percentunit",
        ),
    ],
    "Queue and batch": [
        Panel(
            "Queue",
            "Requests that wait for a place in the batch, and those in it.",
            {
                "waiting": _sum("lorax_requests_waiting"),
                "running": _sum("lorax_requests_running"),
                "in flight": _sum("lorax_requests_in_flight"),
            },
        ),
        Panel(
            "Time in the queue",
            "From admission to the first step.",
            _percentiles("lorax_queue_time_seconds"),
            "s",
        ),
        Panel("Batch size", "Sequences in one step.", _percentiles("lorax_batch_size")),
        Panel("Step", "Duration of one step.", _percentiles("lorax_step_seconds"), "s"),
        Panel(
            "Tokens",
            "Prompt tokens admitted, and tokens generated, in a second.",
            {
                "prompt": _rate("lorax_prompt_tokens_total"),
                "generated": _rate("lorax_generated_tokens_total"),
            },
        ),
        Panel(
            "Generated tokens by adapter",
            "The ten adapters with most tokens in a second; _base is the base model.",
            {"{{adapter}}": f"topk(10, {_rate('lorax_generated_tokens_total', 'adapter')})"},
        ),
    ],
    "Adapters": [
        Panel(
            "Adapters by tier",
            "Loaded adapters, and how many of them are in host memory and in device slots.",
            {
                "loaded": _sum("lorax_adapters_loaded"),
                "{{tier}}": _sum("lorax_adapters_resident", "tier"),
            },
        ),
        Panel(
            "Memory for adapters",
            "Taken, and the limit.",
            {
                "{{tier}}": _sum("lorax_adapter_bytes", "tier"),
                "{{tier}}, limit": _sum("lorax_adapter_bytes_limit", "tier"),
            },
            "bytes",
        ),
        Panel(
            "Evictions and reads",
            "Adapters that made room for others, by tier left, and those read from disk again. "
            "Late reads held up a request.",
            {
                "evicted, {{tier}}": _rate("lorax_adapter_evictions_total", "tier"),
                "read": _rate("lorax_adapter_reads_total"),
                "read late": _rate("lorax_adapter_late_reads_total"),
            },
            "ops",
        ),
        Panel(
            "Duration of a read",
            "Mean time to read an adapter again.",
            {
                "mean": f"{_rate('lorax_adapter_read_seconds_total')} / "
                f"{_rate('lorax_adapter_reads_total')}"
            },
            "s",
        ),
        Panel(
            "Loads and unloads",
            "Versions that were loaded and freed.",
            {
                "loaded": _rate("lorax_adapter_loads_total"),
                "freed": _rate("lorax_adapter_unloads_total"),
            },
            "ops",
        ),
        Panel(
            "Refusals by reason",
            "Loads that failed.",
            {"{{reason}}": f"{_rate('lorax_adapter_rejects_total', 'reason')} > 0"},
            "ops",
        ),
        Panel(
            "Failed adapters",
            "What each replica should serve and could not load when it last tried.",
            {"{{instance}}": "lorax_adapters_failed{SEL}"},
        ),
        Panel(
            "Manifest",
            "Adapters that each replica's manifest asks for, and replicas that cannot read theirs.",
            {
                "{{instance}}": "lorax_manifest_adapters{SEL}",
                "unreadable": "sum(rate(lorax_manifest_read_errors_total{SEL}[RANGE]) > bool 0)",
            },
        ),
        Panel(
            "Replicas that have an adapter",
            "In how many replicas' memory the adapters are that are in any: 1 if each goes to one.",
            {
                "mean": "avg(count by (adapter) (lorax_adapter_resident{SEL}))",
                "most": "max(count by (adapter) (lorax_adapter_resident{SEL}))",
            },
        ),
    ],
    "KV cache": [
        Panel(
            "KV cache",
            "Share of the KV cache that running sequences use, and that holds prefixes.",
            {
                "used": f"{_sum('lorax_kv_tokens_used')} / {_sum('lorax_kv_tokens_capacity')}",
                "prefixes": f"{_sum('lorax_kv_tokens_cached')} / "
                f"{_sum('lorax_kv_tokens_capacity')}",
            },
            "percentunit",
            1,
        ),
        Panel(
            "Prefix cache hits",
            "Share of the prompts' tokens that need not be computed.",
            {
                "hits": f"{_rate('lorax_prefix_cache_hits_total')} / "
                f"{_rate('lorax_prefix_cache_queries_total')}"
            },
            "percentunit",
            1,
        ),
        Panel(
            "Preemptions and failures",
            "Requests that gave their memory to others, and those that the engine failed on.",
            {
                "preempted": _rate("lorax_preemptions_total"),
                "failed": _rate("lorax_requests_failed_total"),
            },
            "ops",
        ),
    ],
    "Processes": [
        Panel(
            "Memory of the server",
            "Resident memory of the server's process; the engine is a process of its own.",
            {"{{instance}}": "process_resident_memory_bytes{SEL}"},
            "bytes",
        ),
        Panel(
            "CPU of the server",
            "Cores that the server's process uses; the engine is a process of its own.",
            {"{{instance}}": "rate(process_cpu_seconds_total{SEL}[RANGE])"},
        ),
        Panel(
            "Up since",
            "Time since each replica was started.",
            {"{{instance}}": "time() - process_start_time_seconds{SEL}"},
            "s",
        ),
    ],
}


def _expression(query: str) -> str:
    return query.replace("SEL", SELECTOR).replace("RANGE", "$__rate_interval")


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    limits = {} if panel.most is None else {"max": panel.most}
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, **limits}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": SOURCE,
                "expr": _expression(query),
                "legendFormat": legend,
            }
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> dict[str, Any]:
    """As Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": WIDTH * PER_LINE, "h": 1}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place, "panels": []}
        )
        y += 1
        for index, panel in enumerate(row):
            line, column = divmod(index, PER_LINE)
            panels.append(_panel(panel, len(panels) + 1, column * WIDTH, y + line * HEIGHT))
        y += HEIGHT * -(-len(row) // PER_LINE)
    firing = {
        "name": "Alerts",
        "enable": True,
        "datasource": SOURCE,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Lorax.*", alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{instance}}",
    }
    return {
        "uid": "lorax",
        "title": "lorax",
        "tags": ["lorax"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "annotations": {"list": [firing]},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                _variable("job", "label_values(lorax_build_info, job)"),
                _variable("instance", 'label_values(lorax_build_info{job=~"$job"}, instance)'),
            ]
        },
        "panels": panels,
    }


def main() -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if they differ")
    check = parser.parse_args().check
    wanted = json.dumps(dashboard(), indent=2) + "\n"
    if not check:
        FILE.write_text(wanted, encoding="utf-8")
        return 0
    if FILE.read_text(encoding="utf-8") == wanted:
        return 0
    print("deploy/monitoring/grafana/lorax.json is stale: run generate.py beside it")
    return 1


if __name__ == "__main__":
    sys.exit(main())
