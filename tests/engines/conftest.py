"""Every engine in turn: ONNX Runtime's, torch's on the CPU, and torch's on an accelerator."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.data import DataSource
from edge_agent.engine import Engine
from edge_agent.local_training import LocalEngine
from fedloom.graph_contracts import EVAL_GRAPH, TRAIN_GRAPH
from fedloom.plans import Plan
from tests.edge_agent.toy import (
    EVAL_TEXT,
    INFER_TEXT,
    TRAIN_TEXT,
    Toy,
    save_toy,
    toy_rows,
    write_rows,
)


@dataclass(frozen=True)
class Kind:
    """An engine; `graph` is the one that it trains with."""

    name: str
    graph: str
    repeats: bool = True  # equal bits for equal trainings

    def make(
        self,
        folder: Path,
        plan: Plan,
        train_data: DataSource,
        held_out: DataSource | None = None,
        **options: int,
    ) -> LocalEngine:
        """Return the engine on one thread."""
        if self.name == "onnx":
            from edge_agent.onnx_engine import OnnxEngine

            return OnnxEngine(folder, plan, train_data, held_out, threads=1, **options)
        from edge_agent.torch_engine import TorchEngine

        device = "cpu" if self.name == "torch" else "auto"
        return TorchEngine(folder, plan, train_data, held_out, threads=1, device=device, **options)


KINDS = (
    Kind("onnx", TRAIN_GRAPH),
    Kind("torch", EVAL_GRAPH),
    Kind("accelerator", EVAL_GRAPH, repeats=False),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.torch)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each engine in turn."""
    if request.param.name == "accelerator":
        from edge_agent.torch_engine import available_devices

        if available_devices() == ["cpu"]:
            pytest.skip("needs a device of torch besides the CPU: CUDA, MPS or XPU")
    return request.param


@pytest.fixture
def make_toy(tmp_path: Path, kind: Kind) -> Callable[..., Toy]:
    """Make a toy plan; an edit is an (old, new) replacement in the texts of its graphs."""

    def make(name: str = "plan", edit: tuple[str, str] = ("", ""), max_tokens: int = 16) -> Toy:
        old, new = edit
        own = {TRAIN_GRAPH: TRAIN_TEXT, EVAL_GRAPH: EVAL_TEXT}[kind.graph]
        assert old in own
        texts = [text.replace(old, new) if old else text for text in (TRAIN_TEXT, EVAL_TEXT)]
        return save_toy(tmp_path / name, texts[0], INFER_TEXT, max_tokens, texts[1])

    return make


@pytest.fixture
def toy(make_toy: Callable[..., Toy]) -> Toy:
    """The toy plan as it should be."""
    return make_toy()


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[[str, list[tuple[str, str]]], DataSource]:
    """Write rows under a header into a CSV file of that name."""
    return lambda name, rows: write_rows(tmp_path / name, rows)


@pytest.fixture
def train_data(tmp_path: Path) -> DataSource:
    """200 rows to train on."""
    return write_rows(tmp_path / "train.csv", toy_rows(200, seed=1))


@pytest.fixture
def held_out(tmp_path: Path) -> DataSource:
    """100 other rows."""
    return write_rows(tmp_path / "held_out.csv", toy_rows(100, seed=2))


@pytest.fixture
def engine(kind: Kind, toy: Toy, train_data: DataSource, held_out: DataSource) -> Engine:
    """An engine over the toy."""
    return kind.make(toy.folder, toy.plan, train_data, held_out)
