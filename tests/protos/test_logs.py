"""Logs: one line an event, whatever a peer says; no secrets; a stalled reader stops nothing."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom import logs
from fedloom.errors import ConfigError

HOSTILE = st.text(
    st.sampled_from("a\x1b[]m\n\r\t\0\x7f\x9b\u2028\u202e\ud800=\"\\ é{}'") | st.characters()
)


def run(program: str, *options: str) -> list[str]:
    """Run a program after `configure_logs` and return the lines that it logged."""
    head = f"from fedloom.logs import configure_logs; configure_logs({', '.join(options)})\n"
    head += "import structlog; log = structlog.get_logger()\n"
    result = subprocess.run(
        [sys.executable, "-c", head + program], check=True, capture_output=True, text=True
    )
    return result.stderr.splitlines()


def render(processors: list[Any], event: dict[str, Any]) -> str:
    """Return an event as these processors write it."""
    found: Any = {"timestamp": "2026-11-20T00:00:00Z", "level": "info", "event": "x", **event}
    for processor in processors:
        found = processor(None, "info", found)
    assert isinstance(found, str)
    return found


@given(HOSTILE, st.floats())
def test_a_peer_starts_no_line_and_speaks_to_no_terminal(text: str, number: float) -> None:
    facts: dict[str, Any] = {"subject": text, "parts": [text], "fault": ValueError(text)}
    line = render(logs._text_lines(on_terminal=False), facts | {"loss": number})
    assert line.isprintable()
    colours = ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[35m", "\x1b[36m", "\x1b[22m")
    terminal = render(logs._text_lines(on_terminal=True), facts | {"loss": number})
    for colour in colours:
        terminal = terminal.replace(colour, "")
    assert terminal.isprintable()


@given(HOSTILE, st.floats())
def test_json_holds_what_was_said(text: str, number: float) -> None:
    line = render(logs._json_lines(), {"subject": text, "loss": number})
    assert line.isascii()
    assert line.isprintable()
    found = json.loads(line, parse_constant=pytest.fail)
    assert found["subject"] == text
    assert float(found["loss"]) == number or number != number


@given(HOSTILE)
def test_an_exception_forges_no_event(text: str) -> None:
    event = {"exc_info": ValueError(text)}
    lines = render(logs._text_lines(on_terminal=True), event).split("\n")
    assert all(line.startswith("    ") and line.isprintable() for line in lines[1:])


def test_an_exception_is_a_field_without_its_local_variables() -> None:
    program = "def step(secret):\n  1 / 0\ntry: step('hunt' + 'er2')\nexcept ZeroDivisionError: "
    for options in (("True",), ("False",)):
        lines = run(program + "log.exception('step failed')", *options)
        assert len(lines) == 1
        assert "ZeroDivisionError" in lines[0]
        assert "hunter2" not in lines[0]
    (found,) = json.loads(run(program + "log.exception('step failed')", "True")[0])["exception"]
    assert found["exc_type"] == "ZeroDivisionError"


def test_times_are_utc_and_levels_filter() -> None:
    program = "[getattr(log, level)('x') for level in ('debug', 'info', 'warning', 'error')]"
    counts = [len(run(program, "True", repr(level))) for level in logs.LEVELS]
    assert counts == [4, 3, 2, 1]
    assert json.loads(run("log.info('x')", "True")[0])["timestamp"].endswith("Z")


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="debug, info, warning, error"):
        logs.configure_logs(as_json=True, level="loud")


def test_libraries_log_the_same_way() -> None:
    program = (
        "import logging, warnings\nlogging.getLogger('grpc').error('lost %s', 'x')\n"
        "logging.getLogger('asyncio').info('chatter')\nwarnings.warn('old')\n"
    )
    found = [json.loads(line) for line in run(program, "True")]
    assert [(line["logger"], line["level"]) for line in found] == [
        ("grpc", "error"),
        ("py.warnings", "warning"),
    ]
    assert found[0]["message"] == "lost x"


def test_a_failed_handshake_writes_nothing_past_the_logs() -> None:
    program = "import fedloom, os; print(os.environ['GRPC_VERBOSITY'])"
    environment = {k: v for k, v in os.environ.items() if k != "GRPC_VERBOSITY"}
    command = [sys.executable, "-c", program]
    for wish, expected in ({}, "ERROR"), ({"GRPC_VERBOSITY": "DEBUG"}, "DEBUG"):
        result = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment | wish
        )
        assert result.stdout.strip() == expected


@pytest.mark.parametrize("reads_later", [False, True])
def test_a_stalled_reader_stops_nothing_and_what_is_lost_is_counted(reads_later: bool) -> None:
    lines = 3 * logs.MAX_WAITING_LINES  # more than a pipe and the queue hold
    program = (
        "import sys, structlog; from fedloom.logs import configure_logs; configure_logs(True)\n"
        f"for i in range({lines}): structlog.get_logger().info('event', number=i)\n"
        "print('went on', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        assert process.stdout.readline() == "went on\n"
        if not reads_later:
            process.stdin.close()
            assert process.wait(60) == 0  # it comes to its end although nobody reads
            process.stderr.close()
            return
        seen, dropped = 0, 0
        while not dropped:
            found = json.loads(process.stderr.readline())
            seen += found["event"] == "event"
            dropped = found.get("lines", 0)
        assert seen + dropped == lines
        process.stdin.close()
