"""Find names of persons in a text with an exported model that tags words."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Encoding

from edge_agent.encoders import load_tokenizer
from edge_agent.graphs import GraphSession
from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError, Reason, Refused
from fedloom.graph_contracts import infer_contract
from fedloom.plans import ADAPTER_FILE, load_plan
from fedloom.tasks import TokenClassification

_WORD = re.compile(r"\w+(?:[-'\N{RIGHT SINGLE QUOTATION MARK}]\w+)*|[^\w\s]")
_PERSON = re.compile(r"(?:[BIES]-)?(?:PER|PERS|PERSON|NAME)", re.IGNORECASE)
_WHERE = "privacy.names_model"


class NameFinder:
    """Finds names; a text that is longer than the model takes is looked at in parts."""

    def __init__(self, folder: Path) -> None:
        """Load the model; raises ConfigError for a folder that holds none, or tags no persons."""
        try:
            plan = load_plan(folder)
            if not isinstance(plan.task, TokenClassification):
                raise ConfigError(_WHERE, f"expected a model that tags words in {folder}")
            self._theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
            self._tokenizer = load_tokenizer(folder)
            graph = infer_contract(plan.task, plan.parameter_count)
            self._session = GraphSession(folder, graph, 0, Reason.PLAN_UNSUPPORTED)
        except (OSError, Refused) as error:
            raise ConfigError(_WHERE, f"expected an exported model: {error}") from error
        self._tokenizer.enable_truncation(plan.task.max_tokens)
        self._tokenizer.no_padding()
        self._persons = [bool(_PERSON.fullmatch(label)) for label in plan.task.labels]
        if not any(self._persons):
            raise ConfigError(_WHERE, f"expected a label such as B-PER, found {plan.task.labels}")

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where names begin and end; words of a name that follow each other are one."""
        words = list(_WORD.finditer(text))
        named: list[int] = []
        if words:
            encoding = self._tokenizer.encode([word[0] for word in words], is_pretokenized=True)
            for part in (encoding, *encoding.overflowing):
                named += self._named(part)
        start = before = -2
        for word in [*sorted(set(named)), len(words) + 1]:
            if word != before + 1:
                if before >= 0:
                    yield words[start].start(), words[before].end()
                start = word
            before = word

    def _named(self, part: Encoding) -> Iterator[int]:
        """Yield the words that the model takes for names."""
        input_ids = np.array([part.ids], np.int64)
        feeds = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
        (logits,) = self._session.run(["logits"], {"theta": self._theta, **feeds})
        before = None
        for word, best in zip(part.word_ids, logits[0].argmax(axis=-1).tolist(), strict=True):
            if word is not None and word != before and self._persons[best]:
                yield word
            before = word
