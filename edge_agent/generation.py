"""Causal language models on the device: `gen.onnx` with its key-value cache, token after token.

One run of the graph takes the whole prompt, then each takes one token and the cache of the run
before. The cache goes back in as it came out: binding inputs and outputs, or keeping ONNX Runtime's
own values, was measured and gains nothing (README).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.encoders import TextEncoder, checked_text
from edge_agent.graphs import GraphSession
from edge_agent.sampling import Logits, Sampler, Sampling
from edge_agent.token_stream import StopStrings, TextStream
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import gen_contract
from fedloom.tasks import CausalLanguageModelling, fill_template, template_fields

MAX_NEW_TOKENS = 131_072
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
_PREFILL_TOKENS = 512  # of a prompt in one run: bounds the memory of activations

_Cache = Mapping[str, NDArray[Any]]  # past.LAYER.key and .value, (1, H, T, D)


class Ending(StrEnum):
    """Why a text ended."""

    STOP = "stop"  # a stop token, or a stop string
    LENGTH = "length"  # as many tokens as were asked for, or as the model can hold


@dataclass(frozen=True)
class Request:
    """What to write; raises Refused(MALFORMED) for values out of range."""

    max_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()  # strings before which the text ends

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= MAX_NEW_TOKENS:
            raise Refused(
                Reason.MALFORMED,
                f"expected max_tokens in 1..{MAX_NEW_TOKENS}, found {self.max_tokens}",
            )
        fits = len(self.stop) <= MAX_STOPS
        if not fits or not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in self.stop):
            raise Refused(
                Reason.MALFORMED,
                f"expected at most {MAX_STOPS} stop strings of 1..{MAX_STOP_CHARACTERS} characters",
            )


@dataclass(frozen=True)
class Ended:
    """The last thing that a generation yields."""

    ending: Ending
    prompt_tokens: int
    tokens: int  # that were made, the stop token not counted


class LanguageModel:
    """A plan's `gen.onnx`: one session that any number of adapters and threads share."""

    def __init__(
        self, folder: Path, task: CausalLanguageModelling, parameters: int, threads: int = 0
    ) -> None:
        self.task = task
        self._encoder = TextEncoder(folder, task)
        graph = gen_contract(task, parameters)
        self._session = GraphSession(folder, graph, threads, Reason.PLAN_UNSUPPORTED, prepack=True)
        self._outputs = list(graph.outputs)
        self._past = [name for name in graph.inputs if name.startswith("past.")]

    @property
    def columns(self) -> list[str]:
        """Names of what the prompt is filled with."""
        return list(dict.fromkeys(template_fields(self.task.prompt)))

    def prompt(self, given: str | Mapping[str, str]) -> str:
        """Return the text to go on from: the plan's prompt, filled with a text or with columns.

        Where the prompt has no columns, the text follows it. Raises Refused(MALFORMED).
        """
        columns = self.columns
        for text in [given] if isinstance(given, str) else given.values():
            checked_text(text)
        if isinstance(given, str):
            if not columns:
                return self.task.prompt + given
            if len(columns) > 1:
                raise _expected(f"an object with the columns {columns} of the prompt", "a text")
            given = {columns[0]: given}
        if sorted(given) != sorted(columns):
            raise _expected(f"the columns {columns} of the prompt", sorted(given))
        return fill_template(self.task.prompt, dict(given))

    def encode(self, prompt: str) -> list[int]:
        """Return the prompt's ids; an empty one is a padding token where nothing begins a text."""
        return self._encoder.prompt_ids(prompt) or [self.task.pad_token_id]

    def generate(
        self,
        theta: Theta,
        prompt: str,
        request: Request,
    ) -> Iterator[str | Ended]:
        """Yield the text in pieces of whole characters as it is made, then how it ended."""
        ids = self.encode(prompt)
        text, stops = TextStream(self._encoder), StopStrings(request.stop)
        room = min(request.max_tokens, self.task.max_tokens - len(ids))
        count, ending = 0, Ending.LENGTH
        for token in self.tokens(theta, ids, request.sampling, room):
            if token in self.task.stop_token_ids:
                ending = Ending.STOP
                break
            count += 1
            if piece := stops.push(text.push(token)):
                yield piece
            if stops.found is not None:
                break
        if rest := stops.push(text.finish()) + stops.finish():
            yield rest
        if stops.found is not None:
            ending = Ending.STOP
        yield Ended(ending, len(ids), count)

    def tokens(
        self, theta: Theta, ids: Sequence[int], sampling: Sampling, most: int
    ) -> Iterator[int]:
        """Yield at most `most` tokens after `ids`, whatever they are."""
        if most <= 0:
            raise _expected(f"a prompt of fewer than {self.task.max_tokens} tokens", f"{len(ids)}")
        sampler = Sampler(sampling)
        logits, cache = self.prefill(theta, ids)
        for made in range(1, most + 1):
            token = sampler.choose(logits)
            yield token
            if made < most:
                logits, cache = self.step(theta, [token], cache)

    def prefill(self, theta: Theta, ids: Sequence[int]) -> tuple[Logits, _Cache]:
        """Return the logits (V,) after `ids` and their cache."""
        empty = np.zeros((1, self.task.heads, 0, self.task.head_size), np.float32)
        cache: _Cache = dict.fromkeys(self._past, empty)
        logits = np.zeros(0, np.float32)
        for start in range(0, len(ids), _PREFILL_TOKENS):
            logits, cache = self.step(theta, ids[start : start + _PREFILL_TOKENS], cache)
        return logits, cache

    def step(self, theta: Theta, ids: Sequence[int], cache: _Cache) -> tuple[Logits, _Cache]:
        """Return the logits (V,) after some more tokens, and the grown cache."""
        whole = cache[self._past[0]].shape[2] + len(ids)
        feeds: dict[str, NDArray[Any]] = {
            "theta": theta,
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, whole), np.int64),
            **cache,
        }
        logits, *present = self._session.run(self._outputs, feeds)
        return logits[0], dict(zip(self._past, present, strict=True))


def gathered(pieces: Iterable[str | Ended]) -> tuple[str, Ended]:
    """Return a whole text, and how it ended."""
    text: list[str] = []
    for piece in pieces:
        if isinstance(piece, Ended):
            return "".join(text), piece
        text.append(piece)
    raise ValueError("expected pieces that end")


def _expected(what: str, found: object) -> Refused:
    return Refused(Reason.MALFORMED, f"expected {what}, found {found}")
