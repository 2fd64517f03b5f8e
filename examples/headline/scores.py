"""How a trained theta is measured on a case's test rows."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from edge_agent.entities import Entity, Word, merge_tags
from edge_agent.inference import TokenTagger
from edge_agent.onnx_engine import OnnxEngine
from examples.headline.training import Score, Trainer
from fedloom.adapters import Theta
from fedloom.tasks import TokenClassification

Span = tuple[str, int, int]  # kind; characters of the words joined by blanks


class Measure(StrEnum):
    """What a case's figures are."""

    ACCURACY = "accuracy %"
    ENTITY_F1 = "entity F1 %"
    PERPLEXITY = "perplexity"

    @property
    def sign(self) -> int:
        """1 where more is better, else -1."""
        return -1 if self is Measure.PERPLEXITY else 1


@dataclass(frozen=True)
class Judge:
    """Measures on the rows of one file."""

    trainer: Trainer
    measure: Measure
    test: Path

    def score(self) -> Score:
        """Return the measure as a function of theta."""
        task = self.trainer.plan.task
        if self.measure is Measure.ENTITY_F1 and isinstance(task, TokenClassification):
            parameters = self.trainer.plan.parameter_count
            return _entity_score(TokenTagger(self.trainer.folder, task, parameters, 1), self.test)
        return _engine_score(self.trainer.engine(self.test, self.test), self.measure)


def f1_percent(expected: Sequence[set[Span]], found: Sequence[set[Span]]) -> float:
    """Return 100 times the harmonic mean of precision and recall over whole entities."""
    right = sum(len(one & other) for one, other in zip(expected, found, strict=True))
    total = sum(map(len, expected)) + sum(map(len, found))
    return 200 * right / total if total else 0.0


def spans(entities: Sequence[Entity]) -> set[Span]:
    """Return kinds and places."""
    return {(entity.label, entity.start, entity.end) for entity in entities}


def _engine_score(engine: OnnxEngine, measure: Measure) -> Score:
    def score(theta: Theta) -> float:
        found = engine.evaluate(theta)
        if found is None:
            return math.nan
        if measure is Measure.PERPLEXITY:
            return math.exp(min(found.mean_loss, 50.0))
        return 100 * found.correct / found.count

    return score


def _entity_score(tagger: TokenTagger, test: Path) -> Score:
    rows = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()]
    expected = [_expected(row["words"], row["tags"]) for row in rows]

    def score(theta: Theta) -> float:
        answers = tagger.answer(theta, [row["words"] for row in rows])
        return f1_percent(expected, [spans(answer.entities) for answer in answers])

    return score


def _expected(words: Sequence[str], tags: Sequence[str]) -> set[Span]:
    """Return the entities of a row at the places that the tagger gives to words."""
    placed, start = [], 0
    for word in words:
        placed.append(Word(word, start, start + len(word)))
        start += len(word) + 1
    tagged = [(word, tag, 1.0) for word, tag in zip(placed, tags, strict=True)]
    return spans(list(merge_tags(" ".join(words), tagged)))
