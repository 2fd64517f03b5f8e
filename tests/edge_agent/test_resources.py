"""What fits a device: micro-batches from a budget, and refusals before anything is fetched."""

import asyncio
import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import resources
from edge_agent.graphs import require_runtime
from edge_agent.onnx_engine import OnnxEngine
from edge_agent.resources import (
    MAX_TRAINING_ROWS,
    MAX_TRAINING_TOKENS,
    MEGABYTE,
    Resources,
    available_memory,
    least_memory,
    training_tokens,
)
from edge_agent.transfer import Transfer
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused
from fedloom.plans import (
    BASE_FILE,
    PLAN_FILE,
    BaseStorage,
    Plan,
    PlanMember,
    PlanOrigin,
    TrainableTensor,
    TrainingMemory,
)
from fedloom.tasks import ArrayInput, ArrayLearning, TextClassification
from fedloom.terms import LocalTraining
from tests.edge_agent.toy import Unkept

_MEMORY = TrainingMemory(400_000, 300, 115_000, 300)


def plan_of(memory: TrainingMemory | None, longest: int = 64, base_bytes: int = 90 * MEGABYTE):
    task = TextClassification(("a", "b"), longest, 0)
    members = (PlanMember(BASE_FILE, base_bytes, bytes(32)),)
    layout = (TrainableTensor("w", (100_000,), 0),)
    return Plan("tiny", members, layout, task, PlanOrigin("m"), training_memory=memory)


_plans = st.builds(
    plan_of,
    st.builds(
        TrainingMemory,
        st.integers(0, 10**8),
        st.integers(0, 10**6),
        st.integers(0, 10**6),
        st.integers(0, 10**4),
    ),
    st.integers(2, 600),
)


@given(_plans, st.integers(1, 10**10), st.integers(1, 10**4), st.integers(1, 600))
def test_every_micro_batch_fits_the_budget_once_a_row_does(plan, budget, rows, length) -> None:
    """Whatever rows a run is made of, within the limits that the engine cuts by."""
    tokens = training_tokens(plan, budget)
    longest = plan.task.max_tokens
    assert min(longest, MAX_TRAINING_TOKENS) <= tokens <= max(longest, MAX_TRAINING_TOKENS)
    least = least_memory(plan)
    assert least is not None
    if least > budget:
        assert tokens == longest  # it is refused; nothing larger is tried
        return
    length = min(length, longest)
    rows = min(rows, MAX_TRAINING_ROWS, max(1, tokens // length))
    taken = (
        least - plan.training_memory.needed(1, longest) + plan.training_memory.needed(rows, length)
    )
    assert taken <= budget


@given(_plans, st.integers(1, 10**9), st.integers(0, 10**9))
def test_more_memory_never_means_smaller_batches(plan, budget, more) -> None:
    assert training_tokens(plan, budget) <= training_tokens(plan, budget + more)


def test_without_a_budget_or_facts_batches_are_the_usual() -> None:
    assert training_tokens(plan_of(_MEMORY), 0) == MAX_TRAINING_TOKENS
    assert training_tokens(plan_of(None), 1) == MAX_TRAINING_TOKENS
    assert least_memory(plan_of(None)) is None


def test_arrays_count_by_rows() -> None:
    task = ArrayLearning((ArrayInput("x", (4,)),), ("a", "b"))
    memory = TrainingMemory(0, MEGABYTE, 0, 0)
    plan = dataclasses.replace(plan_of(memory), task=task)
    least = least_memory(plan)
    assert least is not None
    assert training_tokens(plan, least) == 1
    assert training_tokens(plan, least + 4 * MEGABYTE) == 5


def test_memory_that_is_not_allowed_is_named(tmp_path: Path) -> None:
    plan = plan_of(_MEMORY)
    with pytest.raises(Refused, match=r"needs 223 MB, engine\.memory_mb allows 200 MB") as caught:
        Resources(200 * MEGABYTE).require_room(plan, tmp_path)
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED
    Resources(224 * MEGABYTE).require_room(plan, tmp_path)
    smaller = plan_of(_MEMORY, base_bytes=24 * MEGABYTE)
    Resources(200 * MEGABYTE).require_room(smaller, tmp_path)  # an int8 base


def test_memory_that_the_system_lacks_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 100 * MEGABYTE)
    with pytest.raises(Refused, match="needs 223 MB, the system has left 100 MB"):
        Resources().require_room(plan_of(_MEMORY), tmp_path)
    monkeypatch.setattr(resources, "available_memory", lambda: None)  # it does not tell
    Resources().require_room(plan_of(_MEMORY), tmp_path)


def test_disk_space_counts_what_is_missing(tmp_path: Path) -> None:
    plan = plan_of(None, base_bytes=10**15)
    with pytest.raises(Refused, match=r"disk space for tiny: it needs 1000000004 MB") as caught:
        Resources().require_room(plan, tmp_path)
    assert caught.value.reason is Reason.STORAGE_FULL
    (tmp_path / BASE_FILE).touch()  # it is here: what it is, the download compares
    Resources().require_room(plan, tmp_path)


class FromMemory(Transfer):
    """Gives artifacts by their digest, and remembers which were asked for."""

    def __init__(self, artifacts: dict[bytes, bytes]) -> None:
        super().__init__(None, "nowhere")
        object.__setattr__(self, "artifacts", artifacts)
        object.__setattr__(self, "fetched", [])

    async def download(self, artifact: ArtifactReference, destination: Path) -> None:
        """Write the file."""
        self.fetched.append(destination.name)
        await asyncio.to_thread(destination.write_bytes, self.artifacts[artifact.sha256])


def test_nothing_but_the_plan_is_fetched_of_one_that_does_not_fit(tmp_path: Path) -> None:
    base = b"weights"
    member = PlanMember(BASE_FILE, len(base), hashlib.sha256(base).digest())
    plan = dataclasses.replace(plan_of(_MEMORY), members=(member,))
    data = plan.encode()
    reference = ArtifactReference(hashlib.sha256(data).digest(), len(data))
    transfer = FromMemory({reference.sha256: data, member.sha256: base})
    with pytest.raises(Refused, match="allows 1 MB"):
        asyncio.run(transfer.download_plan(reference, tmp_path, Resources(MEGABYTE).require_room))
    assert transfer.fetched == [PLAN_FILE]
    roomy = Resources(1000 * MEGABYTE).require_room
    assert asyncio.run(transfer.download_plan(reference, tmp_path, roomy)) == plan
    assert (tmp_path / BASE_FILE).read_bytes() == base


@pytest.fixture
def system(tmp_path: Path):
    """Files as Linux shows them: 900 kB available, 100 kB resident, a group within a group."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (groups / "outer" / "inner").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 900 kB\n")
    (proc / "self" / "status").write_text("Name:\tx\nVmRSS:\t 100 kB\n")
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    return proc, groups


def test_what_is_available_ends_at_the_tightest_group(system) -> None:
    proc, groups = system
    assert available_memory(proc, groups) == 1000 * 1024
    (groups / "outer" / "inner" / "memory.max").write_text("max\n")
    assert available_memory(proc, groups) == 1000 * 1024
    (groups / "outer" / "memory.max").write_text("500000\n")
    assert available_memory(proc, groups) == 500_000


@pytest.mark.parametrize("missing", ["meminfo", "self/status"])
def test_a_system_that_does_not_tell(system, missing: str) -> None:
    proc, groups = system
    (proc / missing).unlink()
    assert available_memory(proc, groups) is None


def test_an_old_runtime_is_told_what_it_lacks(monkeypatch) -> None:
    monkeypatch.setattr("edge_agent.graphs.ort.__version__", "1.16.3")
    require_runtime(BaseStorage.FP32)
    require_runtime(BaseStorage.INT8)
    with pytest.raises(Refused, match=r"ONNX Runtime 1\.20 .*INT4.*1\.16\.3") as caught:
        require_runtime(BaseStorage.INT4)
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED
    monkeypatch.setattr("edge_agent.graphs.ort.__version__", "1.20.0")
    require_runtime(BaseStorage.INT4)


def test_smaller_micro_batches_change_nothing_but_rounding(toy, train_data) -> None:
    terms = LocalTraining(epochs=1, batch_size=16, learning_rate=0.05)
    deltas = [
        OnnxEngine(toy.folder, toy.plan, train_data, None, threads=1, micro_batch_tokens=tokens)
        .train(toy.theta, terms, 5, lambda _: None, Unkept())
        .delta
        for tokens in (1, MAX_TRAINING_TOKENS)
    ]
    assert np.linalg.norm(deltas[0] - deltas[1]) < 1e-4 * np.linalg.norm(deltas[1])
