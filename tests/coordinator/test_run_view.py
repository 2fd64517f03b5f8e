"""How a run looks: in a bounded number of rows, and with nothing that a terminal would obey."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from coordinator.progress import AgentProgress, OpenPhase, RoundProgress, RunProgress
from coordinator.run_state import Phase, Wish
from coordinator.run_view import draw, lines, round_labels, rows_for, warnings
from coordinator.summaries import Stage
from fedloom.errors import Reason
from tests.coordinator.test_progress import RUN

MARKUP = "[/red] [bold]n[1] \x1b[31m\u202e"  # for rich, for a terminal, for a reader
HISTORY = (
    RoundProgress(
        *(1, 5.2, 3, 1.952, 448, 261, 3, 12),
        *(0.00002, 960_000, 3, 277_000_000, 3),
    ),
    RoundProgress(2, agents=3, training_loss=1.2),  # its masks could not be taken out
    RoundProgress(
        *(3, 4.4, 3, 0.945, 448, 278, 3, 90_000),
        *(0.0042, 960_000, 3, 1_900_000, 3),
    ),
    RoundProgress(4, agents=3),
)
AGENTS = (
    AgentProgress("attic-sensor", Stage.INVITED),
    AgentProgress("kitchen-pi", Stage.TRAINING, 0.72),
    AgentProgress("hall", Stage.READY, 1.0, 0.512),
    AgentProgress("garage", Stage.DECLINED, 0.1, refusal=Reason.DATA_EMPTY),
)
OPEN = RunProgress(
    replace(RUN, round=4, completed=2, rounds=5),
    "nothing",
    OpenPhase(1, 3, 2471.0, None, 6),
    HISTORY,
    AGENTS,
    {Stage.INVITED: 1, Stage.TRAINING: 1, Stage.READY: 1, Stage.DECLINED: 1},
)
AT_80_COLUMNS = """\
                                 run intent
┏━━━━━━━┳━━━━━━━━━━┳━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━━━┳━━━━━━━━━━━━━┓
┃       ┃          ┃       ┃         ┃          ┃            ┃ coordinator ┃
┃ round ┃ accuracy ┃  loss ┃ seconds ┃ up/agent ┃ down/agent ┃ could read  ┃
┡━━━━━━━╇━━━━━━━━━━╇━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━━━╇━━━━━━━━━━━━━┩
│   1/5 │    58.3% │ 1.952 │     5.2 │  0.32 MB │   92.33 MB │ nothing     │
│  void │          │ 1.200 │         │          │            │             │
│   2/5 │    62.1% │ 0.945 │     4.4 │  0.32 MB │    0.63 MB │ nothing     │
│   3/5 │          │       │         │          │            │             │
└───────┴──────────┴───────┴─────────┴──────────┴────────────┴─────────────┘
training: 1 of 3 agents are ready, 41:01 left
attic-sensor  invited   ━━━━━━━━━━━━━━━━    0%
kitchen-pi    training  ━━━━━━━━━━━╸━━━━   72%
hall          ready     ━━━━━━━━━━━━━━━━  100%  loss 0.512
garage        declined  ━╸━━━━━━━━━━━━━━   10%  DATA_EMPTY
4 agents: 1 invited, 1 training, 1 ready, 1 declined
warning: 0.42% of the values of round 2/5 were clipped: the model learns less
than it could; a larger protection.clip, or a smaller learning rate, helps
"""


def drawn(progress: RunProgress, width: int, height: int = 24) -> str:
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
        record=True,
    )
    rounds, agents = rows_for(height)
    console.print(draw(progress, width, rounds, agents, now=10.0))
    return console.export_text()


def test_it_is_drawn_like_this() -> None:
    assert [line.rstrip() for line in drawn(OPEN, 80).splitlines()] == AT_80_COLUMNS.splitlines()


def test_a_wide_terminal_shows_who_took_part_and_what_was_clipped() -> None:
    heading = drawn(OPEN, 120).splitlines()[3]
    assert [cell.strip() for cell in heading.split("┃")[6:9]] == ["down/agent", "agents", "clipped"]
    assert "│      3 │   0.42% │" in drawn(OPEN, 120)


@pytest.mark.parametrize("width", [40, 80, 120, 300])
@pytest.mark.parametrize("height", [10, 24, 50])
def test_a_thousand_agents_and_rounds_fit_the_terminal(width: int, height: int) -> None:
    agents = tuple(AgentProgress(f"agent-{i:04}", Stage.TRAINING, i / 1000) for i in range(1000))
    history = tuple(replace(HISTORY[2], round=number) for number in range(1, 1001))
    big = replace(OPEN, history=history, agents=agents, stages={Stage.TRAINING: 1000})
    text = drawn(big, width, height)
    assert all(len(line) <= width for line in text.splitlines())
    if width >= 80:  # narrower ones wrap the longest lines
        assert len(text.splitlines()) <= max(height, 24)
    assert "agent-0000" in text
    assert "agent-0999" not in text
    assert "1,000 agents: 1,000 training" in text
    assert "earlier rounds are not" in text


@pytest.mark.parametrize("width", [80, 120])
def test_names_are_shown_as_they_are_and_obeyed_by_nobody(width: int) -> None:
    hostile = replace(
        OPEN,
        run=replace(OPEN.run, name=MARKUP),
        agents=(AgentProgress("\x1b]0;x\x07", Stage.TRAINING),),
        coordinator_reads="\x9b2J",
    )
    text = drawn(hostile, width)
    assert r"run [/red] [bold]n[1] \x1b[31m\u202e" in text
    for line in (*text.splitlines(), *lines(hostile, None)):
        assert line.isprintable()


@pytest.mark.parametrize(
    ("progress", "told"),
    [
        (replace(OPEN, open_phase=None), "training: no coordinator is serving this folder"),
        (
            replace(OPEN, open_phase=OpenPhase(behind=bytes(16))),
            "training: queued behind run 00000000",
        ),
        (
            replace(OPEN, run=replace(OPEN.run, phase=Phase.GATHERING, wish=Wish.PAUSE)),
            "paused: `run resume` lets it go on",
        ),
        (replace(OPEN, run=replace(OPEN.run, wish=Wish.PAUSE)), "training, then paused: 1 of 3"),
        (replace(OPEN, run=replace(OPEN.run, wish=Wish.CANCEL)), "being cancelled: 1 of 3"),
        (
            replace(OPEN, run=replace(OPEN.run, phase=Phase.FAILED, reason=Reason.RUN_CANCELLED)),
            "\ncancelled",
        ),
        (
            replace(OPEN, run=replace(OPEN.run, phase=Phase.FAILED, reason=Reason.KEY_UNAVAILABLE)),
            "failed: KEY_UNAVAILABLE",
        ),
        (
            replace(
                OPEN,
                run=replace(OPEN.run, phase=Phase.GATHERING),
                open_phase=OpenPhase(3, 3, 70.0, None, 3),
            ),
            "gathering: 3 of 3 agents are here, waits for its key, 1:00 left",
        ),
    ],
)
def test_it_says_why_it_waits(progress: RunProgress, told: str) -> None:
    text = "\n".join(line.rstrip() for line in drawn(progress, 80).splitlines())
    assert told in text


def test_a_void_round_has_no_place_in_the_count() -> None:
    assert round_labels(OPEN) == {1: "1/5", 2: "void", 3: "2/5", 4: "3/5"}
    over = replace(OPEN, run=replace(OPEN.run, phase=Phase.FAILED))
    assert round_labels(over)[4] == "void"
    assert round_labels(replace(OPEN, history=())) == {}


@pytest.mark.parametrize(("share", "warns"), [(None, False), (0.001, False), (0.0011, True)])
def test_clipping_is_warned_of_above_a_thousandth(share: float | None, warns: bool) -> None:
    history = (replace(HISTORY[0], saturated_share=share),)
    assert bool(list(warnings(replace(OPEN, history=history)))) is warns


def test_each_change_is_told_once_in_a_line() -> None:
    gathering = replace(
        OPEN,
        run=replace(OPEN.run, phase=Phase.GATHERING),
        open_phase=OpenPhase(1, 3, 9.0, None, 1),
        history=(),
        agents=(),
    )
    training = replace(OPEN, history=(RoundProgress(1),), agents=AGENTS[1:2])
    finished = replace(training, history=HISTORY[:1])
    completed = replace(OPEN, run=replace(OPEN.run, phase=Phase.COMPLETED), history=HISTORY[:3])
    later = replace(training, open_phase=OpenPhase(1, 3, 99.0, None, 7))
    states = [gathering, gathering, training, later, finished, completed]
    told = [
        list(lines(after, before))
        for before, after in zip([None, *states[:-1]], states, strict=True)
    ]
    assert told == [
        ["run intent: gathering, 1 of 3 agents are here"],
        [],
        ["run intent: round 1/5, training, 1 of 3 agents are ready, trained 50%"],
        [],  # a deadline that moved is no news
        [
            "run intent: round 1/5 finished in 5.2 s, accuracy 58.3%, loss 1.952, "
            "0.32 MB up and 92.33 MB down per agent",
        ],
        [
            "run intent: round 2/5 finished in 4.4 s, accuracy 62.1%, loss 0.945, "
            "0.32 MB up and 0.63 MB down per agent",
            "run intent: completed",
            "run intent: warning: 0.42% of the values of round 2/5 were clipped: the model learns "
            "less than it could; a larger protection.clip, or a smaller learning rate, helps",
        ],
    ]


MEASURED = (
    replace(HISTORY[0], correct=0, evaluated=0, quality=(("accuracy", 0.25), ("loss", 1.5))),
    replace(HISTORY[1], round=2, seconds=3.0, summed=3),
    RoundProgress(3, agents=3),
)


def _drawn(width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(draw(replace(OPEN, history=MEASURED), width, 5, 0, 0.0))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_means_stand_under_the_model_that_the_round_began_with() -> None:
    narrow, wide = _drawn(80), _drawn(120)
    for drawn in (narrow, wide):
        assert "before" in drawn
        assert "25.0%" in drawn
    assert "held-out loss" not in narrow  # the first metric alone has room
    assert "held-out loss" in wide
    assert "1.500" in wide
    told = next(lines(replace(OPEN, history=MEASURED), None))
    assert "began with accuracy 25.0%, held-out loss 1.500" in told


def test_a_run_that_ends_early_says_why() -> None:
    run = replace(RUN, phase=Phase.COMPLETED, completed=2, rounds=5, early_end="loss stood still")
    over = replace(OPEN, run=run, open_phase=None)
    assert any("completed early: loss stood still" in line for line in lines(over, None))
