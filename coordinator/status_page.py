"""What the operator's HTTP port shows: `/`, the newest runs, and `/metrics`, the series."""

import time
from html import escape

import prometheus_client as prometheus

from coordinator.http_port import Page, Pages
from coordinator.metrics import Metrics
from coordinator.progress import RoundProgress, RunProgress, read_progress
from coordinator.run_state import Phase
from coordinator.store import RunRecord, Store
from fedloom.errors import ConfigError

SHOWN_RUNS = 20
SHOWN_ROUNDS = 20


def operator_pages(store: Store, metrics: Metrics) -> Pages:
    """Return the pages by path."""
    return {"/": lambda: _overview(store), "/metrics": lambda: _series(metrics)}


def _series(metrics: Metrics) -> Page:
    body = prometheus.generate_latest(metrics.registry)
    return Page(prometheus.CONTENT_TYPE_PLAIN_0_0_4, body)


def _overview(store: Store) -> Page:
    newest = store.runs()[: -SHOWN_RUNS - 1 : -1]
    runs = "".join(_run(store, record) for record in newest)
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    text = _FRAME.format(runs=runs or "<p>No run yet.</p>", now=now)
    return Page("text/html; charset=utf-8", text.encode(errors="replace"))


def _run(store: Store, record: RunRecord) -> str:
    try:
        run = read_progress(store, record)
    except ConfigError:  # of an older version; the other runs are shown all the same
        return f"<h2>{escape(record.name)} <small>its file cannot be read</small></h2>"
    state = run.phase.value + (f": {run.reason}" if run.reason else "")
    rounds = "".join(_round(entry, run.rounds) for entry in run.history[-SHOWN_ROUNDS:])
    return (
        f"<h2>{escape(run.name)} <small>{escape(state)}</small></h2><p>{escape(run.run_id)}, "
        f"{escape(run.protection.name.lower())}: the coordinator could read "
        f"{escape(run.coordinator_reads)}{escape(_training(run))}</p><table>{_HEADINGS}{rounds}</table>"
    )


def _training(run: RunProgress) -> str:
    if run.phase is not Phase.TRAINING or not run.history:
        return ""
    shares = [f"{agent.agent} {agent.progress:.0%}" for agent in run.history[-1].agents]
    return f"; training: {', '.join(shares)}"


def _round(entry: RoundProgress, rounds: int) -> str:
    cells = (
        f"{entry.round}/{rounds}",
        "" if entry.accuracy is None else f"{entry.accuracy:.1%}",
        "" if entry.training_loss is None else f"{entry.training_loss:.3f}",
        "" if entry.seconds is None else f"{entry.seconds:.1f}",
        str(len(entry.agents)),
    )
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


_HEADINGS = "<tr><th>round<th>accuracy<th>loss<th>seconds<th>agents</tr>"
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
