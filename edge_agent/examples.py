"""From a device's data file to examples that a plan's graphs take, by the plan's task."""

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_agent.batches import ClassifiedTexts, Examples, TokenisedTexts
from edge_agent.data import DataSource, Rows
from edge_agent.encoders import TextEncoder
from fedloom.plans import Plan
from fedloom.tasks import TextClassification, unsupported


def read_examples(folder: Path, plan: Plan, source: DataSource) -> tuple[Examples, int]:
    """Read a file once; return its examples and the number of broken rows, which are left out.

    Raises Refused: DATA_* as `Rows`, PLAN_UNSUPPORTED for a task that this version cannot do.
    """
    match plan.task:
        case TextClassification() as task:
            return _classified_texts(TextEncoder(folder, task), task, source)
        case task:
            raise unsupported(task, "text classification")


def _classified_texts(
    encoder: TextEncoder, task: TextClassification, source: DataSource
) -> tuple[ClassifiedTexts, int]:
    """Only a block of the texts is in memory at a time."""
    rows = Rows(source, task.labels)
    classes = array("q")

    def texts() -> Iterator[str]:
        for row in rows:
            classes.append(row.label)
            yield row.text

    tokenised = TokenisedTexts.from_ids(encoder.ids(texts()))
    examples = ClassifiedTexts(tokenised, np.array(classes, np.int64), task.pad_token_id)
    return examples, rows.broken
