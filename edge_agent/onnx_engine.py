"""The engine of devices without torch: a plan's graphs in ONNX Runtime, which gives the sums."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edge_agent.batches import Feeds
from edge_agent.data import DataSource
from edge_agent.graphs import CPU, GraphSession, require_runtime
from edge_agent.local_training import LocalEngine, Step
from edge_agent.metrics import evaluation_outputs
from edge_agent.resources import MAX_TRAINING_ROWS, MAX_TRAINING_TOKENS
from fedloom.adapters import Theta
from fedloom.errors import Reason
from fedloom.graph_contracts import GraphContract, eval_contract, train_contract
from fedloom.plans import Plan

_SUMS = ("loss_sum", "weight_sum", "grad_sum")


class OnnxEngine(LocalEngine):
    """See LocalEngine.

    `threads` 0 leaves the number to ONNX Runtime (one for each physical core). `providers` are its
    execution providers, the best first. Equal updates to the last bit need the same number of
    threads, and the CPU's provider.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        train_data: DataSource,
        held_out: DataSource | None,
        threads: int = 0,
        micro_batch: int = MAX_TRAINING_ROWS,
        micro_batch_tokens: int = MAX_TRAINING_TOKENS,
        providers: tuple[str, ...] = (CPU,),
    ) -> None:
        super().__init__(folder, plan, train_data, held_out, micro_batch, micro_batch_tokens)
        self._threads = threads
        self._providers = providers
        require_runtime(plan.base_storage)

    def _training_step(self) -> Step:
        contract = train_contract(
            self._plan.task, self._plan.parameter_count, self._plan.trained_count
        )
        return self._step(contract, _SUMS, Reason.TRAINING_FAILED)

    def _evaluation_step(self) -> Step:
        contract = eval_contract(self._plan.task, self._plan.parameter_count)
        return self._step(contract, evaluation_outputs(self._plan.task), Reason.PLAN_UNSUPPORTED)

    def _step(self, graph: GraphContract, outputs: Sequence[str], failure: Reason) -> Step:
        session = GraphSession(self._folder, graph, self._threads, failure, self._providers)
        return _SessionStep(session, outputs)


class _SessionStep:
    """A Step: some outputs of a session."""

    ahead = False

    def __init__(self, session: GraphSession, outputs: Sequence[str]) -> None:
        self._session = session
        self._outputs = outputs

    def place(self, feeds: Feeds) -> Feeds:
        """See Step: ONNX Runtime reads the arrays where they are."""
        return feeds

    def sums(self, theta: Theta, placed: Feeds) -> list[NDArray[Any]]:
        """See Step."""
        return self._session.run(self._outputs, {"theta": theta, **placed})
