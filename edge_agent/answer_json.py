"""Answers as JSON, the same in `infer --json` and over HTTP; and the JSON that asks for a text."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from edge_agent.generation import Ended, Request
from edge_agent.inference import Answer, Entities, Prediction, Values
from edge_agent.sampling import Sampling
from fedloom.errors import Reason, Refused

DEFAULT_TOP = 5
_SAMPLING = {field.name for field in fields(Sampling)}
_KINDS: dict[str, tuple[type, ...]] = {
    "max_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int, type(None)),
    "stop": (str, list),
}


def answer_json(answer: Answer, top: int = DEFAULT_TOP) -> dict[str, object]:
    """Return plain values; of a prediction the `top` most probable labels."""
    match answer:
        case Prediction():
            return {
                "label": answer.label,
                "probability": answer.probability,
                "probabilities": answer.most_probable(top),
            }
        case Entities():
            return {"entities": [asdict(entity) for entity in answer.entities]}
        case Values():
            return {"values": list(answer.values)}


def ended_json(ended: Ended) -> dict[str, object]:
    """Return how a text ended."""
    return {
        "ending": ended.ending.value,
        "prompt_tokens": ended.prompt_tokens,
        "tokens": ended.tokens,
    }


def read_request(values: Mapping[str, Any]) -> Request:
    """Validate what a text is asked for with; raises Refused(MALFORMED), for unknown keys too."""
    for key, value in values.items():
        if key not in _KINDS:
            raise Refused(Reason.MALFORMED, f"expected one of {sorted(_KINDS)}, found {key[:40]!r}")
        if type(value) not in _KINDS[key]:
            kinds = " or ".join(kind.__name__ for kind in _KINDS[key])
            raise Refused(
                Reason.MALFORMED, f"expected {key}: {kinds}, found {type(value).__name__}"
            )
    stop = values.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not all(isinstance(text, str) for text in stop):
        raise Refused(Reason.MALFORMED, "expected stop: texts")
    sampling = Sampling(**{key: values[key] for key in _SAMPLING & values.keys()})
    most = values.get("max_tokens", Request.max_tokens)
    return Request(most, sampling, tuple(stop))
