"""How a run looks on a terminal, and as lines where there is none.

The drawing has a bounded number of rows, whatever the number of rounds and agents.
"""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coordinator.commands.output import safe
from coordinator.progress import (
    SATURATION_WARNING,
    AgentProgress,
    RoundProgress,
    RunProgress,
    mean,
)
from coordinator.run_state import Phase, Wish
from coordinator.summaries import Stage
from fedloom.errors import Reason
from fedloom.quality import Metric

MAX_ROUNDS_SHOWN = 50
_NAMES = {
    Metric.MACRO_F1.value: "macro F1",
    Metric.ENTITY_F1.value: "entity F1",
    Metric.MEAN_SQUARED_ERROR.value: "squared error",
    Metric.LOSS.value: "held-out loss",
}
_SHARES = frozenset(metric.value for metric in Metric if metric.rises)
WIDE = 100  # columns, from which on there is room for what is nice to know
_ROUNDS_LIVE, _AGENTS_LIVE, _OTHER_ROWS = 5, 4, 12
_DONE = {
    Phase.GATHERING: "agents are here",
    Phase.TRAINING: "agents are ready",
    Phase.COLLECTING: "updates are in",
    Phase.APPLYING: "agents have applied the sum",
    Phase.RETURNING: "opened sums are back",
}


def rows_for(height: int) -> tuple[int, int]:
    """Return how many rounds and how many agents a terminal of `height` rows has room for."""
    room = max(0, height - _OTHER_ROWS - _ROUNDS_LIVE - _AGENTS_LIVE)
    return _ROUNDS_LIVE + room // 2, _AGENTS_LIVE + room // 2


def draw(progress: RunProgress, width: int, rounds: int, agents: int, now: float) -> RenderableType:
    """Draw the run with its last `rounds` rounds and the `agents` that are furthest behind."""
    title = Text(f"run {safe(progress.run.name)}")
    table = _rounds_table(progress, width, rounds, title)
    parts: list[RenderableType] = [table if progress.history else title, _footer(progress, now)]
    if not progress.run.phase.over and progress.agents:
        parts += [_agents_table(progress, width, agents), _stages(progress, agents)]
    parts += [Text(f"warning: {text}", style="bold yellow") for text in warnings(progress)]
    return Group(*parts)


def _rounds_table(progress: RunProgress, width: int, limit: int, title: Text) -> Table:
    is_wide = width >= WIDE
    table = Table(title=title)
    metrics = _metrics(progress)[: None if is_wide else 1]
    told = [f"{_NAMES.get(name, name)}\nbefore" for name in metrics] or ["accuracy"]
    headings = ["round", *told, "loss", "seconds", "up/agent", "down/agent"]
    for heading in [*headings, *(["agents", "clipped"] if is_wide else [])]:
        table.add_column(heading, justify="right")
    table.add_column("coordinator\ncould read", no_wrap=True)
    labels = round_labels(progress)
    for entry in progress.history[-limit:]:
        wide = [str(entry.summed or ""), _share(entry.saturated_share)] if is_wide else []
        table.add_row(
            labels[entry.round],
            *_told(entry, metrics),
            "" if entry.training_loss is None else f"{entry.training_loss:.3f}",
            "" if entry.seconds is None else f"{entry.seconds:.1f}",
            _megabytes(entry.sent_bytes, entry.senders),
            _megabytes(entry.received_bytes, entry.receivers),
            *wide,
            safe(progress.coordinator_reads) if entry.summed else "",
        )
    if (hidden := len(progress.history) - limit) > 0:
        table.caption = Text(f"{hidden:,} earlier rounds are not shown")
    return table


def _metrics(progress: RunProgress) -> list[str]:
    """Return the metrics that any round told the mean of, in order."""
    return list(dict.fromkeys(name for entry in progress.history for name, _ in entry.quality))


def _told(entry: RoundProgress, metrics: Sequence[str]) -> list[str]:
    """Return the cells of quality: of the model that the round began with, or of the round's."""
    if not metrics:
        return [_percent(entry.accuracy)]
    values = dict(entry.quality)
    return [_number(name, values[name]) if name in values else "" for name in metrics]


def _number(metric: str, value: float) -> str:
    return _percent(value) if metric in _SHARES else f"{value:.3f}"


def round_labels(progress: RunProgress) -> dict[int, str]:
    """Return `k/n` for the k-th round that counts; a void one has no k."""
    labels, counted = {}, 0
    last = progress.history[-1].round if progress.history else 0
    for entry in progress.history:
        is_void = not entry.summed and (entry.round < last or progress.run.phase.over)
        counted += not is_void
        labels[entry.round] = "void" if is_void else f"{counted}/{progress.run.rounds}"
    return labels


def _agents_table(progress: RunProgress, width: int, limit: int) -> Table:
    bar = width // 5
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column("agent", no_wrap=True, overflow="ellipsis", max_width=width // 4)
    table.add_column("stage", no_wrap=True)
    table.add_column("bar", width=bar)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("note", no_wrap=True, overflow="ellipsis")
    for agent in progress.agents[:limit]:
        table.add_row(
            Text(safe(agent.agent)),
            Text(agent.stage.value),
            ProgressBar(total=1.0, completed=agent.progress, width=bar),
            f"{agent.progress:.0%}",
            _note(agent),
        )
    return table


def _note(agent: AgentProgress) -> str:
    if agent.stage is Stage.DECLINED and agent.refusal is not None:
        return agent.refusal.name
    return "" if agent.training_loss is None else f"loss {agent.training_loss:.3f}"


def _stages(progress: RunProgress, shown: int) -> Text:
    counts = ", ".join(f"{count:,} {stage.value}" for stage, count in progress.stages.items())
    total = sum(progress.stages.values())
    hidden = total - min(shown, len(progress.agents))
    more = f"; {hidden:,} more are further on" if hidden else ""
    return Text(f"{total:,} agents: {counts}{more}")


def _footer(progress: RunProgress, now: float) -> Text:
    return Text(f"{progress.run.state}{_why(progress)}{_left(progress, now)}")


def _left(progress: RunProgress, now: float) -> str:
    phase = progress.open_phase
    if phase is None or phase.deadline is None or progress.run.phase.over:
        return ""
    return f", {_clock(max(0.0, phase.deadline - now))} left"


def _why(progress: RunProgress) -> str:
    """Say what the run waits for, or why it failed."""
    run, phase = progress.run, progress.open_phase
    if run.phase.over:
        if run.early_end:
            return f" early: {run.early_end}"
        told = run.reason is None or run.reason is Reason.RUN_CANCELLED
        return "" if told or run.reason is None else f": {run.reason.name}"
    if phase is None:
        return ": no coordinator is serving this folder (`serve`)"
    if phase.behind is not None:
        return f": queued behind run {phase.behind.hex()[:8]}"
    if run.wish is Wish.PAUSE and run.phase is Phase.GATHERING:
        return ": `run resume` lets it go on"
    what = _DONE.get(run.phase)
    if what is None or not phase.expected:  # it is being opened
        return ""
    key = ", waits for its key" if run.phase is Phase.GATHERING and _is_enough(progress) else ""
    return f": {phase.done:,} of {phase.expected:,} {what}{key}"


def _is_enough(progress: RunProgress) -> bool:
    phase = progress.open_phase
    return phase is not None and phase.done >= phase.expected


def warnings(progress: RunProgress) -> Iterator[str]:
    """Say what an operator should do something about."""
    labels = round_labels(progress)
    clipped = [
        entry
        for entry in progress.history
        if entry.saturated_share is not None and entry.saturated_share > SATURATION_WARNING
    ]
    if clipped:
        last = clipped[-1]
        yield (
            f"{_share(last.saturated_share)} of the values of round {labels[last.round]} were "
            "clipped: the model learns less than it could; a larger protection.clip, or a smaller "
            "learning rate, helps"
        )


def lines(progress: RunProgress, before: RunProgress | None) -> Iterator[str]:
    """Yield a line for each thing that changed: rounds that ended, and what is waited for."""
    known = frozenset() if before is None else frozenset(before.history)
    labels = round_labels(progress)
    name = f"run {safe(progress.run.name)}"
    for entry in progress.history:
        if entry.seconds is not None and entry not in known:
            yield f"{name}: round {labels[entry.round]} {', '.join(_facts(entry))}"
    now = f"{name}: {_now(progress, labels)}"
    if before is None or now != f"{name}: {_now(before, round_labels(before))}":
        yield now
    told = () if before is None else tuple(warnings(before))
    yield from (f"{name}: warning: {text}" for text in warnings(progress) if text not in told)


def _facts(entry: RoundProgress) -> Iterator[str]:
    yield f"finished in {entry.seconds:.1f} s"
    if entry.accuracy is not None:
        yield f"accuracy {entry.accuracy:.1%}"
    if entry.quality:
        told = (f"{_NAMES.get(name, name)} {_number(name, value)}" for name, value in entry.quality)
        yield f"began with {', '.join(told)}"
    if entry.training_loss is not None:
        yield f"loss {entry.training_loss:.3f}"
    if entry.senders and entry.receivers:
        up = _megabytes(entry.sent_bytes, entry.senders)
        yield f"{up} up and {_megabytes(entry.received_bytes, entry.receivers)} down per agent"


def _now(progress: RunProgress, labels: dict[int, str]) -> str:
    """Say what the run does, without what changes by itself: times are not told."""
    run, phase = progress.run, progress.open_phase
    parts = [run.state]
    if run.phase.over or phase is None:
        return parts[0] + _why(progress)
    if progress.history and run.phase is not Phase.GATHERING:
        parts.insert(0, f"round {labels[progress.history[-1].round]}")
    if phase.behind is not None:
        parts.append(f"queued behind run {phase.behind.hex()[:8]}")
    elif run.phase in _DONE and phase.expected:
        parts.append(f"{phase.done:,} of {phase.expected:,} {_DONE[run.phase]}")
    if run.phase is Phase.TRAINING and (quarters := _quarters(progress.agents)):
        parts.append(f"trained {25 * quarters}%")
    return ", ".join(parts)


def _quarters(agents: Sequence[AgentProgress]) -> int:
    at_work = [agent.progress for agent in agents if agent.stage is not Stage.DECLINED]
    return int(4 * sum(at_work) / len(at_work)) if at_work else 0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _megabytes(total: int, count: int) -> str:
    average = mean(total, count)
    return "" if average is None else f"{average / 1e6:.2f} MB"
