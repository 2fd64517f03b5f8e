"""The plan as frozen values: read from `plan.binpb`, validated once, trusted afterwards.

A plan folder holds `plan.binpb` and the members that it names; `verify_members` compares them with
their SHA-256.
"""

import dataclasses
import hashlib
import math
import re
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from google.protobuf.message import DecodeError

from fedloom.errors import Reason, Refused
from fedloom.tasks import Task, read_task, write_task
from fedloom.v1 import plan_pb2

PLAN_FILE = "plan.binpb"
BASE_FILE = "base.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
TOKENIZER_FILE = "tokenizer.json"

FORMAT = 1
MAX_PLAN_BYTES = 4 << 20
MAX_MEMBERS = 64
MAX_PARAMETERS = 2**31 - 1
MAX_MEMORY = 2**48  # bytes of any kind in TrainingMemory: products with it stay exact anywhere
MAX_RANK = 32  # numpy 1 has no more; bounds the product of extents before it is taken
_MEMBER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class PlanMember:
    """One file of the bundle; `sha256` is 32 bytes."""

    name: str
    size_bytes: int
    sha256: bytes


class Role(IntEnum):
    """What a trainable tensor is to the model; a role that this version does not know is WEIGHT."""

    WEIGHT = 0
    LORA_A = 1
    LORA_B = 2
    HEAD = 3
    RESIDUAL = 4

    @classmethod
    def _missing_(cls, value: object) -> "Role":
        return cls.WEIGHT


class BaseStorage(IntEnum):
    """How the matrices of `base.safetensors` are stored; numbers as in `plan.proto`."""

    FP32 = 0
    INT8 = 1
    INT4 = 2


@dataclass(frozen=True)
class TrainableTensor:
    """A slice of theta: `prod(shape)` values from index `offset`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    role: Role = Role.WEIGHT

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlanOrigin:
    """Where the plan comes from, for people."""

    base_model: str
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = ()
    lora_a_frozen: bool = False

    @property
    def lora_scale(self) -> float:
        """s of W + s B A; 0 when there is no LoRA."""
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0


@dataclass(frozen=True)
class TrainingMemory:
    """What a training step holds at once beside theta and the base, in bytes: an estimate."""

    fixed_bytes: int
    row_bytes: int
    token_bytes: int
    token_pair_bytes: int

    def __post_init__(self) -> None:
        for found in (self.fixed_bytes, self.row_bytes, self.token_bytes, self.token_pair_bytes):
            _require(0 <= found <= MAX_MEMORY, f"at most {MAX_MEMORY} bytes of memory", found)

    def needed(self, rows: int, tokens: int) -> int:
        """Return the bytes for so many rows of so many tokens each; 1 for arrays."""
        row = self.row_bytes + tokens * (self.token_bytes + tokens * self.token_pair_bytes)
        return self.fixed_bytes + rows * row


@dataclass(frozen=True)
class Plan:
    """What a device trains. Made by `Plan(...)`, read by `parse_plan`; both validate."""

    name: str
    members: tuple[PlanMember, ...]
    layout: tuple[TrainableTensor, ...]
    task: Task
    origin: PlanOrigin
    base_storage: BaseStorage = BaseStorage.FP32
    training_memory: TrainingMemory | None = None

    def __post_init__(self) -> None:
        _require(len(self.name) <= 128, "a name of at most 128 characters", len(self.name))
        _check_members(self.members)
        _check_layout(self.layout)

    @property
    def parameter_count(self) -> int:
        """P: length of theta."""
        last = self.layout[-1]
        return last.offset + last.size

    @property
    def trained_count(self) -> int:
        """T: how many values of theta have a gradient; behind them are the residuals."""
        return sum(tensor.size for tensor in self.layout if tensor.role is not Role.RESIDUAL)

    def member(self, name: str) -> PlanMember:
        """Return the member of that name, or refuse the plan."""
        for member in self.members:
            if member.name == name:
                return member
        raise Refused(Reason.PLAN_UNSUPPORTED, f"expected the plan to have {name}, found none")

    def encode(self) -> bytes:
        """Return the bytes of `plan.binpb`; equal plans give equal bytes."""
        message = plan_pb2.Plan(
            format=FORMAT,
            name=self.name,
            members=[
                plan_pb2.PlanMember(name=m.name, size_bytes=m.size_bytes, sha256=m.sha256)
                for m in self.members
            ],
            parameter_count=self.parameter_count,
            layout=[
                plan_pb2.TrainableTensor(
                    name=t.name,
                    shape=t.shape,
                    offset=t.offset,
                    role=plan_pb2.Role.ValueType(t.role),
                )
                for t in self.layout
            ],
            origin=plan_pb2.PlanOrigin(
                base_model=self.origin.base_model,
                lora_rank=self.origin.lora_rank,
                lora_alpha=self.origin.lora_alpha,
                lora_targets=self.origin.lora_targets,
                lora_a_frozen=self.origin.lora_a_frozen,
            ),
            base_storage=plan_pb2.BaseStorage.ValueType(self.base_storage),
        )
        if (memory := self.training_memory) is not None:
            message.training_memory.CopyFrom(plan_pb2.TrainingMemory(**dataclasses.asdict(memory)))
        write_task(self.task, message)
        return message.SerializeToString(deterministic=True)


def parse_plan(data: bytes) -> Plan:
    """Validate the bytes of a `plan.binpb`; raises Refused(MALFORMED or PLAN_UNSUPPORTED)."""
    _require(len(data) <= MAX_PLAN_BYTES, f"a plan of at most {MAX_PLAN_BYTES} bytes", len(data))
    try:
        message = plan_pb2.Plan.FromString(data)
    except DecodeError as error:
        raise Refused(Reason.MALFORMED, "expected a protobuf Plan, found other bytes") from error
    if message.format != FORMAT:
        raise Refused(
            Reason.PLAN_UNSUPPORTED, f"expected format {FORMAT}, found format {message.format}"
        )
    origin = message.origin
    plan = Plan(
        name=message.name,
        members=tuple(PlanMember(m.name, m.size_bytes, m.sha256) for m in message.members),
        layout=tuple(
            TrainableTensor(t.name, tuple(t.shape), t.offset, Role(t.role)) for t in message.layout
        ),
        task=read_task(message),
        origin=PlanOrigin(
            origin.base_model,
            origin.lora_rank,
            origin.lora_alpha,
            tuple(origin.lora_targets),
            origin.lora_a_frozen,
        ),
        base_storage=_read_storage(message.base_storage),
        training_memory=_read_memory(message),
    )
    _require(
        message.parameter_count == plan.parameter_count,
        f"parameter_count {plan.parameter_count} (the layout's)",
        message.parameter_count,
    )
    return plan


def _read_memory(message: plan_pb2.Plan) -> TrainingMemory | None:
    if not message.HasField("training_memory"):
        return None
    found = message.training_memory
    return TrainingMemory(
        found.fixed_bytes, found.row_bytes, found.token_bytes, found.token_pair_bytes
    )


def _read_storage(value: int) -> BaseStorage:
    try:
        return BaseStorage(value)
    except ValueError as error:
        raise Refused(
            Reason.PLAN_UNSUPPORTED,
            f"expected a base storage that this version knows, found {value}",
        ) from error


def load_plan(folder: Path) -> Plan:
    """Read the plan of a folder; its members are not looked at."""
    try:
        return parse_plan((folder / PLAN_FILE).read_bytes())
    except OSError as error:
        raise Refused(
            Reason.PLAN_MISMATCH, f"expected {PLAN_FILE} in the plan folder: {error.strerror}"
        ) from error


def verify_members(plan: Plan, folder: Path) -> None:
    """Compare every member with its size and SHA-256; raises Refused(PLAN_MISMATCH)."""
    for member in plan.members:
        path = folder / member.name
        if not path.is_file() or path.stat().st_size != member.size_bytes:
            raise Refused(
                Reason.PLAN_MISMATCH, f"expected {member.name} with {member.size_bytes} bytes"
            )
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").digest()
        if found != member.sha256:
            raise Refused(
                Reason.PLAN_MISMATCH,
                f"expected {member.name} with SHA-256 {member.sha256.hex()}, found {found.hex()}",
            )


def _require(condition: bool, what: str, found: object) -> None:
    if not condition:
        raise Refused(Reason.MALFORMED, f"expected {what}, found {found}")


def _check_members(members: tuple[PlanMember, ...]) -> None:
    _require(len(members) <= MAX_MEMBERS, f"at most {MAX_MEMBERS} members", len(members))
    names = [member.name for member in members]
    _require(names == sorted(set(names)), "distinct members in ascending order of name", names)
    for member in members:
        usable = _MEMBER_NAME.fullmatch(member.name) and member.name != PLAN_FILE
        _require(bool(usable), "a plain file name as a member's name", repr(member.name[:80]))
        _require(len(member.sha256) == 32, "a SHA-256 of 32 bytes", len(member.sha256))


def _check_layout(layout: tuple[TrainableTensor, ...]) -> None:
    _require(bool(layout), "at least one trainable tensor", 0)
    offset = 0
    for tensor in layout:
        _require(len(tensor.shape) <= MAX_RANK, f"at most {MAX_RANK} axes", len(tensor.shape))
        extents_fit = bool(tensor.shape) and all(1 <= n <= MAX_PARAMETERS for n in tensor.shape)
        _require(extents_fit, "a shape of positive extents", tensor.shape)
        _require(tensor.offset == offset, f"{tensor.name[:80]} at offset {offset}", tensor.offset)
        offset += tensor.size
        _require(offset <= MAX_PARAMETERS, f"at most {MAX_PARAMETERS} parameters", offset)
    roles = [tensor.role for tensor in layout]
    trained = sum(role is not Role.RESIDUAL for role in roles)
    last = Role.RESIDUAL not in roles[:trained] and trained > 0
    _require(last, "residuals behind all that is trained", [role.name for role in roles][:8])
    names = {tensor.name for tensor in layout}
    # safetensors keeps this name for itself: the adapter would be a file that nobody can load.
    _require("__metadata__" not in names, "a tensor's own name", "__metadata__")
    _require(len(names) == len(layout), "distinct tensor names", f"{len(names)} of {len(layout)}")
