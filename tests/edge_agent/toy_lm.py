"""A tiny causal language model made by hand: two layers, tokens are bytes, LoRA on the head.

`gen.onnx` keeps the contract with its key-value cache; `continued` is the slow oracle in numpy that
recomputes everything for every token and knows no cache.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fedloom.adapters import Theta, adapter_header, write_adapter
from fedloom.graph_contracts import GEN_GRAPH
from fedloom.plans import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BASE_FILE,
    PLAN_FILE,
    TOKENIZER_FILE,
    Plan,
    PlanMember,
    PlanOrigin,
    Role,
    TrainableTensor,
)
from fedloom.tasks import CausalLanguageModelling

SPECIAL = ("<pad>", "<s>", "</s>")
PAD, STOP = 0, 2
VOCABULARY = len(SPECIAL) + 256
LAYERS, HEADS, HEAD = 2, 2, 4
WIDTH = HEADS * HEAD
RANK = 2
MAX_TOKENS = 64
LAYOUT = (
    TrainableTensor("head.lora_A.weight", (RANK, WIDTH), 0, Role.LORA_A),
    TrainableTensor("head.lora_B.weight", (VOCABULARY, RANK), RANK * WIDTH, Role.LORA_B),
)
PARAMETERS = RANK * WIDTH + VOCABULARY * RANK
_HEADER = 64  # bytes before the weights in base.safetensors; the toy's header is blank


def _shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "embeddings": (VOCABULARY, WIDTH),
        "positions": (MAX_TOKENS, WIDTH),
        "head": (WIDTH, VOCABULARY),
    }
    for layer in range(LAYERS):
        found |= {f"w{part}{layer}": (WIDTH, WIDTH) for part in "qkvo"}
    return found


def weights() -> dict[str, np.ndarray]:
    """Return the frozen weights."""
    generator = np.random.default_rng(3)
    return {
        name: generator.standard_normal(shape).astype("<f4") for name, shape in _shapes().items()
    }


def _layer(i: int) -> str:
    return f"""
  q{i} = MatMul(x{i}, wq{i})
  k{i} = MatMul(x{i}, wk{i})
  v{i} = MatMul(x{i}, wv{i})
  q{i}h = Reshape(q{i}, by_head)
  k{i}h = Reshape(k{i}, by_head)
  v{i}h = Reshape(v{i}, by_head)
  q{i}t = Transpose<perm = [0, 2, 1, 3]>(q{i}h)
  k{i}t = Transpose<perm = [0, 2, 1, 3]>(k{i}h)
  v{i}t = Transpose<perm = [0, 2, 1, 3]>(v{i}h)
  present_{i}_key = Concat<axis = 2>(past_{i}_key, k{i}t)
  present_{i}_value = Concat<axis = 2>(past_{i}_value, v{i}t)
  keys{i} = Transpose<perm = [0, 1, 3, 2]>(present_{i}_key)
  raw{i} = MatMul(q{i}t, keys{i})
  scaled{i} = Div(raw{i}, root)
  score{i} = Where(seen, scaled{i}, never)
  share{i} = Softmax<axis = -1>(score{i})
  mixed{i} = MatMul(share{i}, present_{i}_value)
  back{i} = Transpose<perm = [0, 2, 1, 3]>(mixed{i})
  flat{i} = Reshape(back{i}, by_width)
  out{i} = MatMul(flat{i}, wo{i})
  bent{i} = Tanh(out{i})
  x{i + 1} = Add(x{i}, bent{i})"""


def _gen_text() -> str:
    past = [f"past_{i}_{part}" for i in range(LAYERS) for part in ("key", "value")]
    inputs = ", ".join(f"float[B,{HEADS},T,{HEAD}] {name}" for name in past)
    outputs = ", ".join(
        f"float[B,{HEADS},W,{HEAD}] {name.replace('past', 'present')}" for name in past
    )
    split = RANK * WIDTH
    return f"""<ir_version: 8, opset_import: ["": 18]>
gen (float[{PARAMETERS}] theta, int64[B,S] input_ids, int64[B,W] attention_mask, {inputs})
  => (float[B,{VOCABULARY}] logits, {outputs}) {{
  by_head = Constant<value = int64[4] {{0, 0, {HEADS}, {HEAD}}}>()
  by_width = Constant<value = int64[3] {{0, 0, {WIDTH}}}>()
  root = Constant<value = float {{{HEAD**0.5}}}>()
  never = Constant<value = float {{-1000000000.0}}>()
  nought = Constant<value = int64 {{0}}>()
  step = Constant<value = int64 {{1}}>()
  last = Constant<value = int64 {{-1}}>()
  zero = Constant<value = int64[1] {{0}}>()
  one = Constant<value = int64[1] {{1}}>()
  two = Constant<value = int64[2] {{1, 2}}>()
  cut = Constant<value = int64[1] {{{split}}}>()
  end = Constant<value = int64[1] {{{PARAMETERS}}}>()
  a_shape = Constant<value = int64[2] {{{RANK}, {WIDTH}}}>()
  b_shape = Constant<value = int64[2] {{{VOCABULARY}, {RANK}}}>()
  past_shape = Shape(past_0_key)
  id_shape = Shape(input_ids)
  two_index = Constant<value = int64 {{2}}>()
  begin = Gather(past_shape, two_index)
  count = Gather(id_shape, step)
  whole = Add(begin, count)
  queries = Range(begin, whole, step)
  places = Range(nought, whole, step)
  row = Unsqueeze(places, zero)
  column = Unsqueeze(queries, one)
  causal = LessOrEqual(row, column)
  present = Cast<to = 9>(attention_mask)
  present_wide = Unsqueeze(present, two)
  seen = And(causal, present_wide)
  words = Gather(embeddings, input_ids)
  place = Gather(positions, queries)
  x0 = Add(words, place)
  {"".join(_layer(i) for i in range(LAYERS))}
  final = Gather<axis = 1>(x{LAYERS}, last)
  flat_a = Slice(theta, zero, cut, zero)
  flat_b = Slice(theta, cut, end, zero)
  lora_a = Reshape(flat_a, a_shape)
  lora_b = Reshape(flat_b, b_shape)
  base_logits = MatMul(final, head)
  inner = Gemm<transB = 1>(final, lora_a)
  more = Gemm<transB = 1>(inner, lora_b)
  logits = Add(base_logits, more)
}}"""


def _save_graph(folder: Path) -> None:
    model = onnx.parser.parse_model(_gen_text())
    ports = [*model.graph.input, *model.graph.output]
    named = {
        f"{kind}_{i}_{part}": f"{kind}.{i}.{part}"
        for kind in ("past", "present")
        for i in range(LAYERS)
        for part in ("key", "value")
    }
    for port in ports:
        port.name = named.get(port.name, port.name)
    for node in model.graph.node:
        node.input[:] = [named.get(name, name) for name in node.input]
        node.output[:] = [named.get(name, name) for name in node.output]
    offset = _HEADER
    external = []
    for name, shape in _shapes().items():
        external.append((name, shape, BASE_FILE, offset))
        offset += 4 * int(np.prod(shape))
    external.append(("theta", (PARAMETERS,), ADAPTER_FILE, len(adapter_header(LAYOUT))))
    for name, shape, location, start in external:
        tensor = model.graph.initializer.add(
            name=name, data_type=onnx.TensorProto.FLOAT, dims=shape
        )
        tensor.data_location = onnx.TensorProto.EXTERNAL
        facts = (("location", location), ("offset", start), ("length", 4 * int(np.prod(shape))))
        for key, value in facts:
            tensor.external_data.add(key=key, value=str(value))
    (folder / GEN_GRAPH).write_bytes(model.SerializeToString())


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer whose tokens are the 256 bytes, after three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


@dataclass(frozen=True)
class ToyLm:
    """A plan folder, its plan, and an adapter that changes what is written (P,)."""

    folder: Path
    plan: Plan
    theta: Theta


def save_toy_lm(folder: Path, prompt: str = "", name: str = "reply") -> ToyLm:
    """Write the plan into a new folder."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(5)
    theta = generator.standard_normal(PARAMETERS).astype(np.float32)
    initial = theta.copy()
    initial[RANK * WIDTH :] = 0  # LoRA's B
    content = b"".join(values.tobytes() for values in weights().values())
    (folder / BASE_FILE).write_bytes(b" " * _HEADER + content)
    (folder / ADAPTER_CONFIG_FILE).write_text("{}")
    write_adapter(folder / ADAPTER_FILE, LAYOUT, initial)
    byte_tokenizer().save(str(folder / TOKENIZER_FILE))
    _save_graph(folder)
    members = tuple(
        PlanMember(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).digest())
        for path in sorted(folder.iterdir())
    )
    task = CausalLanguageModelling(
        MAX_TOKENS, PAD, VOCABULARY, LAYERS, HEADS, HEAD, prompt, "{text}", (STOP,)
    )
    plan = Plan(name, members, LAYOUT, task, PlanOrigin("toy"))
    (folder / PLAN_FILE).write_bytes(plan.encode())
    return ToyLm(folder, plan, theta)


def logits_after(theta: Theta, ids: list[int]) -> np.ndarray:
    """Return the logits (V,) after `ids`, computed from nothing."""
    w = weights()
    x = w["embeddings"][ids].astype(np.float64) + w["positions"][: len(ids)]
    for layer in range(LAYERS):
        q, k, v = (
            (x @ w[f"w{part}{layer}"]).reshape(len(ids), HEADS, HEAD).transpose(1, 0, 2)
            for part in "qkv"
        )
        score = q @ k.transpose(0, 2, 1) / HEAD**0.5
        score[:, np.triu_indices(len(ids), 1)[0], np.triu_indices(len(ids), 1)[1]] = -np.inf
        share = np.exp(score - score.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        mixed = (share @ v).transpose(1, 0, 2).reshape(len(ids), WIDTH)
        x = x + np.tanh(mixed @ w[f"wo{layer}"])
    a = theta[: RANK * WIDTH].reshape(RANK, WIDTH)
    b = theta[RANK * WIDTH :].reshape(VOCABULARY, RANK)
    return x[-1] @ w["head"] + (x[-1] @ a.T) @ b.T


def continued(theta: Theta, ids: list[int], most: int) -> list[int]:
    """Return what greedy decoding writes after `ids`, the stop token not included."""
    written: list[int] = []
    while len(written) < most:
        token = int(logits_after(theta, ids + written).argmax())
        if token == STOP:
            break
        written.append(token)
    return written
