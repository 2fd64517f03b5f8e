"""A plan folder as an agent would check it: hashes, layout, and the graphs' contracts."""

from dataclasses import dataclass
from pathlib import Path

from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.graph_contracts import LoadedGraph, check_session, plan_contracts
from fedloom.plans import ADAPTER_FILE, Plan, load_plan, verify_members


@dataclass(frozen=True)
class VerifiedPlan:
    """A plan, and the files of its graphs that were loaded."""

    plan: Plan
    graphs: tuple[str, ...]


def verify_plan(folder: Path) -> VerifiedPlan:
    """Check a plan folder without running it.

    Raises Refused as an agent would: PLAN_MISMATCH, MALFORMED or PLAN_UNSUPPORTED; ConfigError
    when ONNX Runtime is not installed.
    """
    plan = load_plan(folder)
    verify_members(plan, folder)
    read_adapter(folder / plan.member(ADAPTER_FILE).name, plan.layout)
    members = {member.name for member in plan.members}
    contracts = plan_contracts(plan.task, plan.parameter_count, plan.trained_count)
    graphs = tuple(file for file in contracts if file in members)
    for file in graphs:
        check_session(_loaded(folder / file), contracts[file])
    return VerifiedPlan(plan, graphs)


def _loaded(path: Path) -> LoadedGraph:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ConfigError(
            "plan", 'expected onnxruntime to be installed: pip install "fedloom[plan]"'
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.disable_prepacking", "1")  # it will not be run
    try:
        session: LoadedGraph = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the runtime's classes derive from Exception alone
        problem = str(error).replace(str(path.parent), "")[:200]
        raise Refused(
            Reason.PLAN_UNSUPPORTED,
            f"expected ONNX Runtime {onnxruntime.__version__} to load {path.name}, "
            f"found: {problem}",
        ) from error
    return session
