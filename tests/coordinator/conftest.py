"""What the coordinator's tests share: a store, a run in it, and a plan folder without a model."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from coordinator.bucket import open_bucket
from coordinator.published import Published, PublishedFolder
from coordinator.store import Store
from fedloom.adapters import write_adapter
from fedloom.artifacts import ArtifactReference
from fedloom.graph_contracts import INFER_GRAPH, TRAIN_GRAPH
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASE_FILE,
    PLAN_FILE,
    TOKENIZER_FILE,
    Plan,
    PlanMember,
    PlanOrigin,
)
from fedloom.tasks import TextClassification
from tests.coordinator.object_server import ObjectServer, object_server
from tests.coordinator.postgresql import PostgresServer, postgres_server
from tests.coordinator.samples import LAYOUT, RUN_FILE, PlanFolder

settings.register_profile("any machine", deadline=None)  # a slow one is not wrong
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """A PostgreSQL server for the whole session; a test gets a database of its own."""
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | str]:
    """Where a store is, for each kind that there is; nothing is there yet."""
    if request.param == "sqlite":
        yield tmp_path / "store.sqlite"
        return
    server: PostgresServer = request.getfixturevalue("postgresql")
    with server.database() as url:
        yield url


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """A server that speaks S3, for the whole session; whoever asks it is known to it."""
    with object_server(tmp_path_factory.mktemp("objects")) as server:
        yield server


@pytest.fixture(params=["folder", "bucket"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Published:
    """An empty place of artifacts, of each kind that there is."""
    if request.param == "folder":
        return PublishedFolder(tmp_path / "home" / "artifacts")
    server: ObjectServer = request.getfixturevalue("objects")
    return open_bucket(
        f"s3://{server.bucket()}/fed/loom", server.endpoint, tmp_path / "home" / "spool"
    )


@pytest.fixture
def any_store(place: Path | str) -> Iterator[Store]:
    """An empty store, of each kind that there is."""
    opened = Store(place)
    yield opened
    opened.close()


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


@pytest.fixture
def store(store_path: Path) -> Iterator[Store]:
    opened = Store(store_path)
    yield opened
    opened.close()


@pytest.fixture
def run_id(store: Store) -> bytes:
    """A queued run of three rounds."""
    identity = bytes(range(16))
    plan = ArtifactReference(hashlib.sha256(b"plan").digest(), 4)
    store.add_run(identity, "intent", RUN_FILE, plan, now=1.0)
    return identity


@pytest.fixture
def plan_folder(tmp_path: Path) -> PlanFolder:
    """A plan of eight values; its graphs and its base are bytes that nobody here executes."""
    folder = tmp_path / "plan"
    folder.mkdir()
    theta = np.arange(8, dtype=np.float32)
    for name in (INFER_GRAPH, TRAIN_GRAPH, BASE_FILE, ADAPTER_CONFIG_FILE, TOKENIZER_FILE):
        (folder / name).write_bytes(name.encode() * 100)
    write_adapter(folder / ADAPTER_FILE, LAYOUT, theta)
    members = tuple(
        PlanMember(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).digest())
        for path in sorted(folder.iterdir())
    )
    task = TextClassification(("no", "yes"), 16, 0)
    plan = Plan("toy", members, LAYOUT, task, PlanOrigin("toy"))
    (folder / PLAN_FILE).write_bytes(plan.encode())
    return PlanFolder(folder, plan, theta)
