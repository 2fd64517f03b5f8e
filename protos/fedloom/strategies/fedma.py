"""FedMA: Wang et al., arXiv:2002.06440, Algorithm 1, with communication (section 2.4).

The neurons of a hidden layer are a set: two devices may have learnt the same ones in another order,
and their mean is then of unlike things. FedMA matches them first. In round t of a model of N
layers, n = t mod N:

    layers before n are frozen; devices train layer n and those behind it, and send their weights
    Pi_j <- matching of device j's neurons in layer n (`coordinator.strategies.matching`)
    W_n <- sum_j p_j Pi_j W_j,n            W_j,n+1 <- W_j,n+1 Pi_j^T            n <- n + 1, ...
    the last layer, whose outputs have a meaning, is weighted by class:
    W_N's row k <- sum_j p_jk W_j,N's row k    p_jk = n_jk / sum_j n_jk, of rows with label k

so that N rounds freeze one layer after another, and the next one begins again with all of them.
What travels is the weights themselves, not a movement, and the server's step takes them over; and
behind them n_jk / 2^24 for each output k, zeros where rows have no label: then, and for a label
that nobody has, p_jk is p_j. What is published has zeros there.

Deviations. A plan fixes the length of theta, hence the width of the global layers: it is the
devices' own, every neuron is matched with one, and no new ones are made (the paper's global model
grows). Devices begin a round from what is published, which has the layers behind n matched as well,
and not from their own weights behind n: one sum is published for all. p_j is what the run's
weighting says, 1/J in the paper (`uniform`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused
from fedloom.plans import Role, TrainableTensor
from fedloom.strategies.arithmetic import Vector, blocks, flush
from fedloom.strategies.parts import Layout, Parts
from fedloom.strategies.rule import Algorithm, Memory, Rule, Segment, Sent, ServerState
from fedloom.terms import MAX_WEIGHT_CLASS, LocalTraining, Strategy

_MOST_ROWS = 1 << MAX_WEIGHT_CLASS
_GOES = "strategy fed_ma matches a chain of linear and convolutional layers; use fed_avg"


@dataclass(frozen=True)
class Layer:
    """A linear or convolutional layer: `weight` (outputs, inputs, ...), `bias` (outputs,) or none.

    `spread` inputs, or columns of them, belong to each output of the layer before: the positions of
    a channel, where a linear layer follows a flattened image; 1 elsewhere.
    """

    weight: TrainableTensor
    bias: TrainableTensor | None
    spread: int = 1

    @property
    def start(self) -> int:
        """Place of its first value in theta."""
        return self.weight.offset

    @property
    def stop(self) -> int:
        """Place behind its last value in theta."""
        last = self.bias or self.weight
        return last.offset + last.size


def chain(layout: Layout) -> tuple[Layer, ...]:
    """Return the layers, first to last; raises Refused(PLAN_UNSUPPORTED) for any other layout.

    Shapes alone do not show what is added or multiplied between layers: who starts a run has the
    plan's graph looked at (`coordinator.plans.permutations`).
    """
    layers: list[Layer] = []
    for tensor in layout:
        before = layers[-1] if layers else None
        if tensor.role in (Role.LORA_A, Role.LORA_B, Role.RESIDUAL):
            raise _unsupported(tensor, "no adapter")
        if len(tensor.shape) == 1:
            layers[-1:] = [_with_bias(before, tensor)]
        elif len(tensor.shape) >= 2:
            layers.append(Layer(tensor, None, _spread(before, tensor)))
        else:
            raise _unsupported(tensor, "a weight or a bias")
    if len(layers) < 2:
        raise Refused(
            Reason.PLAN_UNSUPPORTED, f"expected two layers at least, found {len(layers)}; {_GOES}"
        )
    return tuple(layers)


def _with_bias(layer: Layer | None, bias: TrainableTensor) -> Layer:
    """Return the layer with its bias; a vector of another module is a norm's, or unknown."""
    fits = layer is not None and layer.bias is None
    if layer is None or not fits or bias.shape != layer.weight.shape[:1]:
        raise _unsupported(bias, "a weight, and then its bias")
    if _module(bias) != _module(layer.weight) or layer.stop != bias.offset:
        raise _unsupported(bias, f"the bias of {layer.weight.name}, if any")
    return Layer(layer.weight, bias, layer.spread)


def _spread(before: Layer | None, weight: TrainableTensor) -> int:
    if before is None:
        return 1
    outputs, inputs = before.weight.shape[0], weight.shape[1]
    spread, rest = divmod(inputs, outputs)
    flattens = len(before.weight.shape) > 2 and len(weight.shape) == 2
    if rest or spread < 1 or (spread > 1 and not flattens):
        expected = f"{outputs} inputs, the outputs of {before.weight.name}"
        raise _unsupported(weight, expected)
    return spread


def _module(tensor: TrainableTensor) -> str:
    return tensor.name.rpartition(".")[0]


def _unsupported(tensor: TrainableTensor, expected: str) -> Refused:
    return Refused(
        Reason.PLAN_UNSUPPORTED,
        f"expected {expected}, found tensor {tensor.name} of shape {tensor.shape}; {_GOES}",
    )


def open_layers(layout: Layout, rounds: int) -> tuple[Layer, ...]:
    """Return the layers that are trained and sent in the round after `rounds` applied ones."""
    layers = chain(layout)
    return layers[rounds % len(layers) :]


def matched_layers(terms: LocalTraining, layout: Layout, rounds: int) -> tuple[Layer, ...]:
    """Return the layers whose neurons are matched in that round; none with another strategy."""
    return open_layers(layout, rounds) if terms.strategy is Strategy.FED_MA else ()


def matched_parts(layout: Layout, rounds: int) -> Parts:
    """Return the parts of theta in the round after `rounds` applied ones. Raises as `chain`."""
    start, stop = open_layers(layout, rounds)[0].start, layout[-1].offset + layout[-1].size
    return Parts((slice(start, stop),), frozen=(slice(0, start),) if start else ())


def outputs(layout: Layout) -> int:
    """Return C, the number of the last layer's outputs."""
    return chain(layout)[-1].weight.shape[0]


def label_shares(layout: Layout, counts: Sequence[int]) -> Vector:
    """Return what an update has behind its weights, (C,), of the rows of each label."""
    found = np.zeros(outputs(layout), np.float32)
    if len(counts) == len(found):
        np.divide(counts, _MOST_ROWS, out=found, casting="same_kind")
    return found


def _sent(state: ServerState, memory: Memory, delta: Theta, steps: float) -> Sent:
    del memory, steps
    delta += state.theta
    return Sent(delta)


def _apply(state: ServerState, mean_update: Vector, count: int) -> ServerState:
    del count
    weights = mean_update[: len(state.theta)]
    for block in blocks(len(weights)):
        flush(weights[block])
    return ServerState(weights, state.rounds + 1)


def _algorithm(terms: LocalTraining) -> Algorithm:
    del terms
    return Algorithm(_apply, sent=_sent)


RULE = Rule(
    Strategy.FED_MA,
    "FedMA",
    "arXiv:2002.06440, Algorithm 1",
    _algorithm,
    needs="its weights, where no layer is frozen, and its rows of each label; a chain of layers",
    sends=(Segment("weights"),),  # and `outputs` values more
)
