"""What the operator's HTTP port shows: `/`, the newest runs, and `/metrics`, the series."""

import time
from html import escape

import prometheus_client as prometheus

from coordinator.http_port import Page, Pages
from coordinator.metrics import Metrics
from coordinator.operations import Operations
from coordinator.progress import RoundProgress, RunProgress
from coordinator.run_state import Phase
from coordinator.summaries import RunSummary

SHOWN_RUNS = 20
SHOWN_ROUNDS = 20
SHOWN_AGENTS = 50  # those furthest behind


def operator_pages(operations: Operations, metrics: Metrics) -> Pages:
    """Return the pages by path."""
    return {"/": lambda: _overview(operations), "/metrics": lambda: _series(metrics)}


def _series(metrics: Metrics) -> Page:
    body = prometheus.generate_latest(metrics.registry)
    return Page(prometheus.CONTENT_TYPE_PLAIN_0_0_4, body)


def _overview(operations: Operations) -> Page:
    newest = operations.runs("", SHOWN_RUNS, "").items
    runs = "".join(_run(operations, run) for run in newest)
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    text = _FRAME.format(runs=runs or "<p>No run yet.</p>", now=now)
    return Page("text/html; charset=utf-8", text.encode(errors="replace"))


def _run(operations: Operations, run: RunSummary) -> str:
    if run.protection is None:  # of an older version; the other runs are shown all the same
        return f"<h2>{escape(run.name)} <small>its file cannot be read</small></h2>"
    found = operations.watch(run.run_id, SHOWN_AGENTS)()
    state = run.state + (f": {run.reason.name}" if run.reason else "")
    state += f" early: {run.early_end}" if run.early_end else ""
    rounds = "".join(_round(entry, run.rounds) for entry in found.history[-SHOWN_ROUNDS:])
    return (
        f"<h2>{escape(run.name)} <small>{escape(state)}</small></h2><p>{run.run_id.hex()}, "
        f"{run.protection.name.lower()}: the coordinator could read "
        f"{escape(found.coordinator_reads)}{escape(_training(found))}</p>"
        f"<table>{_HEADINGS}{rounds}</table>"
    )


def _training(found: RunProgress) -> str:
    if found.run.phase is not Phase.TRAINING or not found.agents:
        return ""
    shares = [f"{agent.agent} {agent.progress:.0%}" for agent in found.agents]
    return f"; furthest behind: {', '.join(shares)}"


def _round(entry: RoundProgress, rounds: int) -> str:
    cells = (
        f"{entry.round}/{rounds}",
        "" if entry.accuracy is None else f"{entry.accuracy:.1%}",
        ", ".join(f"{name} {value:.4g}" for name, value in entry.quality),
        "" if entry.training_loss is None else f"{entry.training_loss:.3f}",
        "" if entry.seconds is None else f"{entry.seconds:.1f}",
        str(entry.agents),
    )
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


_HEADINGS = "<tr><th>round<th>accuracy<th>model before the round<th>loss<th>seconds<th>agents</tr>"
_FRAME = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="5">
<meta name="viewport" content="width=device-width"><title>Fedloom</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto }}
table {{ border-collapse: collapse }}
th, td {{ padding: .2rem 1rem .2rem 0; text-align: right; font-variant-numeric: tabular-nums }}
small {{ font-weight: normal; color: #666 }}
</style>
<h1>Fedloom</h1>{runs}<p><small>{now} UTC; <a href="/metrics">metrics</a></small></p></html>
"""
