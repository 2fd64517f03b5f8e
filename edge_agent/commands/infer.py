"""`fedloom-agent infer`: answer with a model of this device, once or as an HTTP endpoint.

What computes is imported when it is needed: the other commands start without ONNX Runtime.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.config import CONFIG_FILE, load_agent_config
from edge_agent.identity import load_identity
from fedloom.errors import ConfigError

if TYPE_CHECKING:
    from edge_agent.generation import LanguageModel
    from edge_agent.inference import Adapter, Answer
    from edge_agent.library import Library

DEFAULT_PORT = 7080
DEFAULT_HOST = "127.0.0.1"
_GENERATION = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")


def add_parser(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser("infer", help="answer with a model of this device")
    command.add_argument("texts", nargs="*", help="texts, or JSON; without any, lines of stdin")
    command.add_argument("--adapter", help="name of the adapter; needed where there are several")
    command.add_argument("--model", type=Path, help="folder of an exported model instead")
    command.add_argument("--file", type=Path, help="one input in each line; .jsonl: JSON")
    command.add_argument("--threads", type=int, default=0, help="0: one for each core")
    command.add_argument("--top", type=int, default=5, help="labels to tell of, with --json")
    text = command.add_argument_group("text generation")
    text.add_argument("--max-tokens", type=int, help="most tokens to write; 128")
    text.add_argument("--temperature", type=float, help="0, the default, is greedy")
    text.add_argument("--top-p", type=float, help="nucleus: the share that is drawn from; 1")
    text.add_argument("--top-k", type=int, help="how many tokens are drawn from; 0: all")
    text.add_argument("--seed", type=int, help="repeats what was drawn")
    text.add_argument("--stop", action="append", help="end before this string; may be repeated")
    serve = command.add_argument_group("HTTP endpoint")
    serve.add_argument("--serve", action="store_true", help="answer over HTTP until ended")
    serve.add_argument("--host", default=DEFAULT_HOST, help="address to listen on")
    serve.add_argument("--port", type=int, default=DEFAULT_PORT, help="0: a free one")
    serve.add_argument("--allow-remote", action="store_true", help="permit other than loopback")
    command.set_defaults(command=infer)


def infer(options: argparse.Namespace) -> int:
    """Answer the inputs, or serve."""
    if options.serve:
        return _serve(options)
    if options.top < 1:
        raise ConfigError("--top", f"expected a number from 1, found {options.top}")
    adapter = _adapter(options)
    from edge_agent.generation import LanguageModel

    inputs = _inputs(options, adapter)
    if isinstance(adapter.model, LanguageModel):
        _write(options, adapter, adapter.model, inputs)
        return 0
    from edge_agent.answer_json import answer_json

    given = list(inputs)
    answers: Sequence[Answer] = adapter.model.answer(adapter.theta, given)
    for row, answer in zip(given, answers, strict=True):
        if options.json:
            told = {"input": row, **answer_json(answer, options.top)}
            print(json.dumps(told, ensure_ascii=False))
        else:
            print(_for_a_person(row, answer))
    return 0


def _serve(options: argparse.Namespace) -> int:
    from edge_agent.http_endpoint import Endpoint

    address = (options.host, options.port)
    with Endpoint(address, _library(options), options.allow_remote) as endpoint:
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"http://{host}:{endpoint.server_port}", flush=True)
        endpoint.serve_forever()
    return 0


def _library(options: argparse.Namespace) -> "Library":
    from edge_agent.inference import load_model
    from edge_agent.library import Library
    from edge_agent.model_versions import ModelVersions

    key = load_identity(options.home).identity_key.public_key()
    prompt = None
    if (options.home / CONFIG_FILE).exists():
        prompt = load_agent_config(options.home).data.prompt
    load = partial(load_model, prompt=prompt)
    return Library(ModelVersions(options.home / "models", key), options.threads, load)


def _adapter(options: argparse.Namespace) -> "Adapter":
    if options.model:
        from edge_agent.inference import load_exported

        return load_exported(options.model, options.threads)
    library = _library(options)
    return library.adapter(options.adapter or library.only_name())


def _inputs(options: argparse.Namespace, adapter: "Adapter") -> Iterator[object]:
    """Yield texts, and JSON where the task or the file's name says so."""
    from fedloom.tasks import ArrayLearning

    as_json = isinstance(adapter.plan.task, ArrayLearning)
    as_json = as_json or len(getattr(adapter.model, "columns", ())) > 1
    lines: Iterable[str] = options.texts or (line.strip() for line in sys.stdin)
    if options.file:
        as_json = as_json or options.file.suffix == ".jsonl"
        lines = (line.strip() for line in _lines(options.file))
    for number, line in enumerate(lines, start=1):
        if options.texts or line:
            yield _parsed(line, number) if as_json else line


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "expected UTF-8 text, found other bytes") from error


def _parsed(line: str, number: int) -> object:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError("input", f"expected JSON in line {number}, found other text") from error
    return value["text"] if isinstance(value, dict) and set(value) == {"text"} else value


def _for_a_person(given: object, answer: "Answer") -> str:
    from edge_agent.inference import Entities, Prediction

    match answer:
        case Prediction():
            return f"{answer.label:24} {answer.probability:6.1%}  {given}"
        case Entities():
            found = ", ".join(
                f"{entity.label} {entity.text!r} {entity.start}..{entity.end}"
                for entity in answer.entities
            )
            return f"{found or 'nothing':24}  {given}"
        case values:
            return " ".join(f"{value:.6g}" for value in values.values)


def _write(
    options: argparse.Namespace,
    adapter: "Adapter",
    model: "LanguageModel",
    inputs: Iterable[object],
) -> None:
    """Write a text for each input: as it is made for people, whole with --json."""
    from edge_agent.answer_json import ended_json, read_request
    from edge_agent.generation import gathered

    asked = {name: getattr(options, name) for name in _GENERATION}
    request = read_request({name: value for name, value in asked.items() if value is not None})
    for given in inputs:
        prompt = model.prompt(_prompt(given))
        pieces = model.generate(adapter.theta, prompt, request)
        if options.json:
            text, ended = gathered(pieces)
            row = {"input": given, "text": text, **ended_json(ended)}
            print(json.dumps(row, ensure_ascii=False), flush=True)
            continue
        for piece in pieces:
            if isinstance(piece, str):
                print(piece, end="", flush=True)
        print(flush=True)


def _prompt(given: object) -> str | Mapping[str, str]:
    if isinstance(given, str):
        return given
    if isinstance(given, dict) and all(isinstance(value, str) for value in given.values()):
        return given
    raise ConfigError("input", "expected a text, or an object of texts")
