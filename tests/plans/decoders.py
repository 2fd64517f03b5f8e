"""Tiny random decoders of every architecture that plans are built from."""

from pathlib import Path
from typing import Any

from tests.plans.conftest import save_tokenizer

_SIZES = {"hidden_size": 32, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_COMMON = {"vocab_size": 40, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
POSITIONS = 64


def decoder_config(kind: str) -> Any:
    """Return a configuration: Llama of two layers with a tied head, the others of one."""
    import transformers as t

    layers = {"num_hidden_layers": 1, "max_position_embeddings": POSITIONS, **_COMMON}
    makers = {
        "llama": lambda: t.LlamaConfig(
            **_LLAMA, **layers | {"num_hidden_layers": 2}, tie_word_embeddings=True
        ),
        "qwen2": lambda: t.Qwen2Config(**_LLAMA, **layers),
        "qwen3": lambda: t.Qwen3Config(**_LLAMA, **layers, head_dim=16),
        "gpt2": lambda: t.GPT2Config(
            n_embd=32, n_layer=1, n_head=4, n_positions=POSITIONS, **_COMMON
        ),
        # Its local layers see the last 6 tokens only.
        "gpt_neo": lambda: t.GPTNeoConfig(
            hidden_size=32,
            num_layers=1,
            attention_types=[[["local"], 1]],
            num_heads=4,
            window_size=6,
            max_position_embeddings=POSITIONS,
            **_COMMON,
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(**_SIZES, intermediate_size=48, **layers),
    }
    return makers[kind]()


def save_decoder(kind: str, folder: Path) -> Path:
    """Save a random decoder of that architecture with its tokenizer."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = transformers.AutoModelForCausalLM.from_config(decoder_config(kind))
    # Larger than the usual 0.02, so that attention is far from uniform.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
