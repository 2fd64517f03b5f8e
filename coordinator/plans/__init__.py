"""Build plans: a Hugging Face model becomes graphs that a device trains without torch.

This is the one place of the coordinator that knows torch, transformers, peft and onnx, and only
inside `build_plan`: importing the package loads none of them.
"""

from collections.abc import Callable
from pathlib import Path

from coordinator.plans.modules import TrainableModule
from coordinator.plans.request import PlanExportError, PlanRequest, require_taken
from coordinator.plans.verification import VerifiedPlan, verify_plan
from fedloom.errors import ConfigError
from fedloom.plans import Plan

__all__ = [
    "PlanExportError",
    "PlanRequest",
    "TrainableModule",
    "VerifiedPlan",
    "build_plan",
    "require_taken",
    "verify_plan",
]

_EXTRA = {"onnx", "onnxruntime", "onnxscript", "peft", "safetensors", "tokenizers", "torch"}
_EXTRA |= {"transformers"}


def build_plan(
    request: PlanRequest, out: Path, report: Callable[[str], None], cache: Path | None = None
) -> Plan:
    """Write the plan into `out`, a new or empty folder, and return it.

    `report` gets one line per stage. Graphs depend on the model's configuration alone, not on its
    weights: with `cache`, a folder, they are traced once per configuration. Nothing appears at
    `out` unless everything is there and its graphs have been compared with torch.

    Raises ConfigError for a request, model or installation that cannot be used, PlanExportError
    for a model whose graphs cannot be made or are wrong.
    """
    try:
        from coordinator.plans.build import build
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise ConfigError(
            "plan build", f'expected {error.name} to be installed: pip install "fedloom[plan]"'
        ) from error
    return build(request, out, report, cache)
