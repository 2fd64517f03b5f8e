"""Settings and options of the whole suite: no hub, and hypothesis repeats itself in CI."""

import os

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# New examples are found on the developers' machines; CI says the same twice about the same code.
settings.register_profile("developer", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "developer")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", action="store_true", help="100,000 cases over all parsers")
    parser.addoption("--kills", type=int, default=6, help="of an agent while it trains")
