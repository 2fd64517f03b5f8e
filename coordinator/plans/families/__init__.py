"""The kinds of models: one file says all that is particular to one."""

from collections.abc import Callable

import torch

from coordinator.plans.checkpoints import quiet_transformers
from coordinator.plans.families.array_learning import load_module
from coordinator.plans.families.causal_lm import load_language_model
from coordinator.plans.families.text_classification import load_text_classifier
from coordinator.plans.families.token_classification import load_token_classifier
from coordinator.plans.model import AdaptedModel
from coordinator.plans.request import CAUSAL_LM, CLASSIFICATION, MODULE, NER, PlanRequest
from coordinator.plans.sources import ModelSource, find_model

_LOADERS: dict[str, Callable[[PlanRequest, ModelSource], AdaptedModel]] = {
    CLASSIFICATION: load_text_classifier,
    NER: load_token_classifier,
    CAUSAL_LM: load_language_model,
}


def load_model(request: PlanRequest) -> AdaptedModel:
    """Load what a request names, seeded; torch's own generator is untouched."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(request.seed)
        if request.task == MODULE:
            return load_module(request)
        return _LOADERS[request.task](request, find_model(request.model))
