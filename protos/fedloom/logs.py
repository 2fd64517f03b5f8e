"""Logs of both processes: events with constant text and facts as fields, on stderr.

One line an event: JSON on demand, colours on a terminal, `key=value` in a file. What a peer says is
a fact: its control characters are escaped; it can neither start a line nor speak to a terminal.
"""

import atexit
import logging
import math
import os
import queue
import select
import sys
import threading
from typing import TextIO

import structlog
from structlog.dev import plain_traceback
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

from fedloom.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error")
MAX_WAITING_LINES = 10_000
FLUSH_SECONDS = 2.0
_ORDER = ("timestamp", "level", "event")


def configure_logs(as_json: bool, level: str = "info") -> None:
    """Send this process's events of at least `level` to stderr, and those of its libraries."""
    if level not in LEVELS:
        raise ConfigError("log level", f"expected one of {', '.join(LEVELS)}, found {level!r}")
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *(_json_lines() if as_json else _text_lines(sys.stderr.isatty())),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(_threaded(sys.stderr)),
        cache_logger_on_first_use=True,
    )
    _adopt_libraries(level)


def _json_lines() -> list[Processor]:
    # Without local variables: they hold updates and keys.
    exceptions = ExceptionDictTransformer(show_locals=False)
    return [
        structlog.processors.ExceptionRenderer(exceptions),
        _without_infinities,
        structlog.processors.JSONRenderer(),
    ]


def _text_lines(on_terminal: bool) -> list[Processor]:
    if on_terminal:
        renderer: Processor = structlog.dev.ConsoleRenderer(exception_formatter=plain_traceback)
    else:
        renderer = structlog.processors.LogfmtRenderer(key_order=_ORDER)
    return [structlog.processors.format_exc_info, _printable, renderer]


def _without_infinities(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """JSON has no NaN and no infinity: a reader would refuse the whole line."""
    for key, value in event.items():
        if isinstance(value, float) and not math.isfinite(value):
            event[key] = str(value)
    return event


def _printable(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if key == "exception":  # its lines are kept apart, and none of them looks like an event
            event[key] = "\n".join(f"    {_escaped(line)}" for line in str(value).split("\n"))
        elif not isinstance(value, bool | int | float | None):
            event[key] = _escaped(str(value))
    return event


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Bridge(logging.Handler):
    """What libraries log (gRPC, asyncio, warnings) becomes an event like any other."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(
            min(record.levelno // 10 * 10, logging.CRITICAL),  # the levels that have a name
            "library message",
            logger=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info,
        )


def _adopt_libraries(level: str) -> None:
    root = logging.getLogger()
    if not any(isinstance(handler, _Bridge) for handler in root.handlers):
        root.addHandler(_Bridge())
    root.setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
    logging.captureWarnings(True)


def _threaded(stream: TextIO) -> TextIO:
    """A stream that never blocks, where the stream is a file of the system's."""
    try:
        return _Lines(stream.fileno())  # type: ignore[return-value] # all that a logger needs
    except OSError:
        return stream


class _Lines:
    """Writes lines from a thread of its own.

    A reader that stalls (a full pipe, a stopped terminal) would else stop the event loop and all
    rounds with it. Lines that find no room are dropped, and counted.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._process = os.getpid()
        self._waiting: queue.Queue[str | None] = queue.Queue(MAX_WAITING_LINES)
        self._dropped = 0
        self._writer = threading.Thread(target=self._write_all, name="logs", daemon=True)
        self._writer.start()
        atexit.register(self._end)

    def write(self, line: str) -> None:
        """Queue a line; a process that was forked has no thread and writes at once."""
        if os.getpid() != self._process:
            _write(self._descriptor, line)
            return
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Do nothing: the thread writes each line as soon as it can."""

    def _write_all(self) -> None:
        while (line := self._waiting.get()) is not None:
            _write(self._descriptor, line)
            if self._dropped and self._waiting.empty():
                dropped, self._dropped = self._dropped, 0
                structlog.get_logger().warning("log lines dropped", lines=dropped)

    def _end(self) -> None:
        try:
            self._waiting.put(None, timeout=FLUSH_SECONDS)
        except queue.Full:
            return  # nobody reads
        self._writer.join(FLUSH_SECONDS)


def _write(descriptor: int, line: str) -> None:
    """Write past Python's buffers: a process that ends must find their lock free."""
    rest = line.encode(errors="backslashreplace")
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
        except OSError:
            return  # the reader is gone, and there is nobody else to tell
