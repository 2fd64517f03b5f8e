"""Settings and options of the whole suite: no hub, and hypothesis repeats itself in CI."""

import io
import os
import sys

import pytest
import structlog
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# New examples are found on the developers' machines; CI says the same twice about the same code.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")


class _Stderr(io.TextIOBase):
    """Whatever stands in for standard error when a line is logged."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)


# Commands run in this process, beside the coordinator: what it logs is not what they print.
structlog.configure(logger_factory=structlog.PrintLoggerFactory(_Stderr()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", action="store_true", help="100,000 cases over all parsers")
    parser.addoption("--kills", type=int, default=6, help="of an agent while it trains")


@pytest.fixture(autouse=True)
def logs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no command that runs in this process take the logs of the tests after it along."""
    monkeypatch.setattr(structlog, "configure", lambda **_: None)
    monkeypatch.setattr("fedloom.logs._adopt_libraries", lambda _: None)
