"""How to load each form of an exported model: the few lines that its card shows.

They run as they stand, in the export's folder; PEFT's needs the base model under its name.
"""

import json

from fedloom.plans import Plan
from fedloom.tasks import (
    ArrayLearning,
    CausalLanguageModelling,
    TextClassification,
    TokenClassification,
)

TextTask = TextClassification | TokenClassification | CausalLanguageModelling
_AUTO: dict[type[TextTask], str] = {
    TextClassification: "AutoModelForSequenceClassification",
    TokenClassification: "AutoModelForTokenClassification",
    CausalLanguageModelling: "AutoModelForCausalLM",
}


def snippet(plan: Plan, form: str) -> str:
    """Return Python that loads a form and answers with it; `logits` is the answer."""
    match form, plan.task:
        case "peft", TextClassification() | TokenClassification() | CausalLanguageModelling():
            lines = _peft(plan.task, plan.origin.base_model)
        case "safetensors", _:
            lines = [
                "from safetensors.numpy import load_file",
                "",
                'trained = load_file("safetensors/trained.safetensors")  # name: array',
            ]
        case _:
            lines = _onnx(plan, "." if form == "onnx" else form)
    return "\n".join(lines)


def _onnx(plan: Plan, folder: str) -> list[str]:
    """Theta is in the form `onnx` an input that defaults to the adapter's file."""
    lines = ["import numpy as np", "import onnxruntime"]
    if not isinstance(plan.task, ArrayLearning):
        lines.append("from tokenizers import Tokenizer")
    lines += ["", f'session = onnxruntime.InferenceSession("{folder}/infer.onnx")']
    return [*lines, *_feeds(plan, folder), 'logits = session.run(["logits"], feeds)[0]']


def _feeds(plan: Plan, folder: str) -> list[str]:
    if isinstance(plan.task, ArrayLearning):
        rows = (
            f"{json.dumps(entry.name)}: np.zeros({[1, *entry.shape]}, np.float32)"
            for entry in plan.task.inputs
        )
        return [f"feeds = {{{', '.join(rows)}}}"]
    return [
        f'tokenizer = Tokenizer.from_file("{folder}/tokenizer.json")',
        "tokenizer.no_padding()",
        f"tokenizer.enable_truncation({plan.task.max_tokens})",
        'ids = np.array([tokenizer.encode("some text").ids])',
        'feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}',
    ]


def _peft(task: TextTask, base_model: str) -> list[str]:
    auto = _AUTO[type(task)]
    labels = "" if isinstance(task, CausalLanguageModelling) else f", num_labels={len(task.labels)}"
    return [
        "import torch",
        "from peft import PeftModel",
        "from tokenizers import Tokenizer",
        f"from transformers import {auto}",
        "",
        f"base = {auto}.from_pretrained({json.dumps(base_model)}{labels})",
        'model = PeftModel.from_pretrained(base, "peft").eval()',
        'tokenizer = Tokenizer.from_file("peft/tokenizer.json")',
        "tokenizer.no_padding()",
        f"tokenizer.enable_truncation({task.max_tokens})",
        'ids = torch.tensor([tokenizer.encode("some text").ids])',
        "logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits",
    ]
