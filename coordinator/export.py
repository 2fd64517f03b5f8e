"""The model of a run, where the coordinator can read it: made from the stored sums, on demand.

Nothing is written: the files of the inference half are published artifacts, and the adapter follows
from the plan's and the rounds' sums. The same sums give the same bytes, so a download that was cut
goes on where it ended.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import takewhile

from coordinator.config import RunConfig
from coordinator.model_state import RunModel
from coordinator.published import Published
from coordinator.store import RoundRecord, RunRecord, Store
from fedloom.adapters import Theta, adapter_header
from fedloom.artifacts import SENT_PART_BYTES, ArtifactReference
from fedloom.errors import ConfigError
from fedloom.exports import INFERENCE_FILES
from fedloom.model_cards import CARD_FILE, RunFacts, describe
from fedloom.plans import ADAPTER_FILE, PLAN_FILE, Plan
from fedloom.version import software


@dataclass(frozen=True)
class ModelFile:
    """A file of a model: a published artifact, or the bytes themselves."""

    name: str
    reference: ArtifactReference
    content: Published | bytes  # where it is published, or the bytes

    def parts(self, offset: int = 0) -> Iterator[bytes]:
        """Yield the file's bytes from `offset`."""
        if isinstance(self.content, Published):
            yield from self.content.parts(self.reference.sha256, offset)
            return
        for start in range(offset, len(self.content), SENT_PART_BYTES):
            yield self.content[start : start + SENT_PART_BYTES]


@dataclass(frozen=True)
class Model:
    """A run's model after its finished rounds."""

    files: tuple[ModelFile, ...]
    rounds: int

    def described(self, plan: Plan, run: RunFacts) -> "Model":
        """Return the model with the first part of its card as one more file."""
        content = describe(plan, run, software()).encode()
        return replace(self, files=(*self.files, _made(CARD_FILE, content)))

    def parts(self, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes of all files, one after another, from `offset`."""
        for file in self.files:
            size = file.reference.size_bytes
            if offset < size:
                yield from file.parts(offset)
            offset = max(0, offset - size)


def read_model(
    store: Store, published: Published, run: RunRecord, config: RunConfig, plan: Plan
) -> Model:
    """Repeat the run's rounds from its sums; raises ConfigError where they are not readable."""
    if config.encoding.protection.needs_tenseal and not config.returns_sums:
        raise ConfigError(
            run.name,
            "this coordinator never could read the adapter; every agent has it in its own `models` "
            "folder, and `fedloom-agent export` writes it in other forms",
        )
    rounds = _readable(store.rounds(run.run_id), config)
    state = RunModel(published, run.run_id, config, plan).after(rounds)
    members = {member.name: member for member in plan.members}
    linked = (members[name] for name in INFERENCE_FILES if name in members)
    files = (
        ModelFile(PLAN_FILE, run.plan, published),
        *(
            ModelFile(member.name, ArtifactReference(member.sha256, member.size_bytes), published)
            for member in linked
        ),
        _adapter(plan, state.theta),
    )
    return Model(files, len(rounds))


def _adapter(plan: Plan, theta: Theta) -> ModelFile:
    content = adapter_header(plan.layout) + theta.astype("<f4", copy=False).tobytes()
    return _made(ADAPTER_FILE, content)


def _made(name: str, content: bytes) -> ModelFile:
    return ModelFile(name, ArtifactReference(sha256(content).digest(), len(content)), content)


def _readable(rounds: Sequence[RoundRecord], config: RunConfig) -> list[RoundRecord]:
    """Return the rounds up to the first whose sum agents have not handed over."""
    if not config.returns_sums:
        return list(rounds)
    return list(takewhile(lambda record: record.opened is not None, rounds))
