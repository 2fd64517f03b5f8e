"""What a plan needs of this device, and what the device has: decided before anything is fetched.

Memory is counted as resident: the process itself, the base (mapped, but in use all the time),
some vectors of P values, and what a training step holds, which the plan states.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from fedloom.errors import Reason, Refused
from fedloom.plans import BASE_FILE, Plan, TrainingMemory
from fedloom.tasks import ArrayLearning, Task

MEGABYTE = 10**6
# Padded tokens and rows in one run of the training graph, which keeps every activation. With MiniLM
# and texts of up to 64 tokens, 256 against 1024: peak 198 MB instead of 302 MB, and 15 % less CPU
# time. More rows at once are no faster on a CPU.
MAX_TRAINING_TOKENS = 256
MAX_TRAINING_ROWS = 16
PROCESS_BYTES = (
    120 * MEGABYTE
)  # Python, numpy, gRPC, TenSEAL, ONNX Runtime, tokenizers: as measured
# Of P float32: theta, trained, two of AdamW, the gradient and a micro-batch's, the update, a copy
# on its way to a file.
_VECTORS = 8
# Of residuals, which have no gradient: theta, trained, the update, a copy on its way to a file.
_RESIDUAL_VECTORS = 4
_DISK_BYTES_PER_PARAMETER = 32  # state, checkpoint with AdamW's vectors, update, exported adapter


def training_tokens(plan: Plan, budget_bytes: int) -> int:
    """Return the most padded tokens of a micro-batch within a budget; 0 bytes: there is none.

    It depends on plan and budget alone, never on how busy the device is: a training that goes on
    after a restart adds the same micro-batches in the same order. A row that is longer goes alone.
    """
    memory = plan.training_memory
    if not budget_bytes or memory is None:
        return MAX_TRAINING_TOKENS
    free = budget_bytes - _standing_bytes(plan)
    longest = _longest(plan.task)
    fitting = (
        tokens
        for tokens in range(MAX_TRAINING_TOKENS, longest, -1)
        if _step_bytes(memory, tokens, longest) <= free
    )
    return next(fitting, longest)


def _step_bytes(memory: TrainingMemory, tokens: int, longest: int) -> int:
    """Return the most that so many padded tokens can take, whatever the lengths of their rows."""
    of_token = memory.token_bytes + longest * memory.token_pair_bytes
    rows = min(tokens, MAX_TRAINING_ROWS)
    return memory.fixed_bytes + rows * memory.row_bytes + tokens * of_token


def least_memory(plan: Plan) -> int | None:
    """Return the bytes to train with one row of the longest length at a time; None: not known."""
    if plan.training_memory is None:
        return None
    return _standing_bytes(plan) + plan.training_memory.needed(1, _longest(plan.task))


def _standing_bytes(plan: Plan) -> int:
    sizes = {member.name: member.size_bytes for member in plan.members}
    residuals = plan.parameter_count - plan.trained_count
    vectors = _VECTORS * plan.trained_count + _RESIDUAL_VECTORS * residuals
    return PROCESS_BYTES + sizes.get(BASE_FILE, 0) + 4 * vectors


def _longest(task: Task) -> int:
    return 1 if isinstance(task, ArrayLearning) else task.max_tokens


@dataclass(frozen=True)
class Resources:
    """What the plan may use; `budget_bytes` 0 leaves it to what the system has available."""

    budget_bytes: int = 0

    def require_room(self, plan: Plan, folder: Path) -> None:
        """Refuse a plan that does not fit: PLAN_UNSUPPORTED for memory, STORAGE_FULL for disk.

        `folder` is where its members go, as far as they are not there yet.
        """
        needed = least_memory(plan)
        allowed = self.budget_bytes or available_memory()
        if needed is not None and allowed is not None and needed > allowed:
            whose = "engine.memory_mb allows" if self.budget_bytes else "the system has left"
            raise Refused(
                Reason.PLAN_UNSUPPORTED,
                f"expected memory to train {plan.name} row by row: it needs "
                f"{_megabytes(needed)} MB, {whose} {allowed // MEGABYTE} MB",
            )
        missing = sum(
            member.size_bytes for member in plan.members if not (folder / member.name).is_file()
        )
        needed = missing + _DISK_BYTES_PER_PARAMETER * plan.parameter_count
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise Refused(
                Reason.STORAGE_FULL,
                f"expected disk space for {plan.name}: it needs {_megabytes(needed)} MB, "
                f"{free // MEGABYTE} MB are free",
            )


def _megabytes(count: int) -> int:
    return -(-count // MEGABYTE)


def available_memory(
    proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the bytes that this process may grow to; None where the system does not tell.

    What is available and what the process has already, but no more than its control groups allow.
    """
    try:
        facts = (proc / "meminfo").read_text().splitlines()
        status = (proc / "self" / "status").read_text().splitlines()
        own = _kibibytes(status, "VmRSS:")
        limits = [_kibibytes(facts, "MemAvailable:") + own]
    except (OSError, ValueError):
        return None
    return min(limits + _group_limits(proc, groups))


def _kibibytes(lines: list[str], field: str) -> int:
    """Return a field's value in bytes; raises ValueError when it is not there."""
    for line in lines:
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise ValueError(field)


def _group_limits(proc: Path, groups: Path) -> list[int]:
    """Return memory.max of this process's control group (version 2) and of those around it."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[len("0::/") :] for line in lines if line.startswith("0::/")), "")
    folder = groups / own
    limits = []
    for place in (folder, *folder.parents):
        if not place.is_relative_to(groups):
            break
        try:
            limits.append(int((place / "memory.max").read_text()))
        except (OSError, ValueError):  # no such group here, or "max"
            continue
    return limits
