"""Answer on the device with an exported model (`fedloom.exports`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_agent.batches import ClassifiedTexts, TokenisedTexts
from edge_agent.encoders import TextEncoder
from edge_agent.graphs import GraphSession, batched_logits, log_softmax, require_runtime
from fedloom.adapters import read_adapter
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import infer_contract
from fedloom.plans import ADAPTER_FILE, load_plan
from fedloom.tasks import IGNORED_LABEL, TextClassification, unsupported


@dataclass(frozen=True)
class Prediction:
    """The most probable label of one text."""

    label: str
    probability: float


class Classifier:
    """Answers with an exported model; loads it once, then serves any number of calls."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        """Load the folder; raises Refused(PLAN_MISMATCH, PLAN_UNSUPPORTED or MALFORMED)."""
        plan = load_plan(folder)
        require_runtime(plan.base_storage)
        if not isinstance(plan.task, TextClassification):
            raise unsupported(plan.task, "text classification")
        self._task = plan.task
        try:
            self._theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
        except OSError as error:
            raise Refused(
                Reason.PLAN_MISMATCH, f"expected {ADAPTER_FILE} in the folder: {error.strerror}"
            ) from error
        self._encoder = TextEncoder(folder, plan.task)
        graph = infer_contract(plan.task, plan.parameter_count)
        self._session = GraphSession(folder, graph, threads, Reason.PLAN_UNSUPPORTED)

    def classify(self, texts: Sequence[str]) -> list[Prediction]:
        """Return one prediction for each text, in their order."""
        labels = self._task.labels
        tokenised = TokenisedTexts.from_ids(self._encoder.ids(texts))
        unknown = np.full(len(texts), IGNORED_LABEL)
        examples = ClassifiedTexts(tokenised, unknown, self._task.pad_token_id)
        answers: dict[int, Prediction] = {}
        # The adapter that was checked is fed, so that it is also the one that answers.
        for rows, logits in batched_logits(self._session, self._theta, examples):
            best = logits.argmax(axis=1)  # (B,)
            chosen = np.take_along_axis(log_softmax(logits), best[:, None], axis=1)[:, 0]  # nats
            for row, index, nats in zip(rows.tolist(), best, chosen.tolist(), strict=True):
                answers[row] = Prediction(labels[index], math.exp(nats))
        return [answers[row] for row in range(len(texts))]
