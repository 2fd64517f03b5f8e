"""Which functions are traced for a plan."""

from coordinator.plans.chunked_head import chunked_traces
from coordinator.plans.families.causal_lm import LanguageModel
from coordinator.plans.graphs import Trace, generation_trace, training_trace
from coordinator.plans.model import AdaptedModel


def traces(adapted: AdaptedModel) -> tuple[Trace, ...]:
    """Return what to trace for all graphs but `train_dp.onnx`."""
    family = adapted.family
    if not isinstance(family, LanguageModel):
        return (training_trace(adapted),)
    if family.loss_pieces == 1:
        return training_trace(adapted), generation_trace(adapted, family)
    chunked = chunked_traces(adapted, family, family.loss_pieces)
    return *chunked, generation_trace(adapted, family)
