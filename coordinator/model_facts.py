"""What the card of an exported model says of its run: what this coordinator knows of it."""

from collections.abc import Sequence

from coordinator.config import RunConfig
from coordinator.progress import RoundProgress
from coordinator.store import RunRecord
from fedloom.model_cards import RoundFacts, RunFacts
from fedloom.privacy import PrivacyTerms


def run_facts(
    run: RunRecord,
    config: RunConfig,
    privacy: PrivacyTerms,
    history: Sequence[RoundProgress],
    rounds: int,
) -> RunFacts:
    """Return the facts of a run whose first `rounds` sums are in the model."""
    summed = [entry for entry in history if entry.summed]
    return RunFacts(
        run=run.run_id.hex(),
        name=run.name,
        rounds=rounds,
        of=config.rounds,
        privacy=privacy,
        training=config.training,
        encoding=config.encoding,
        history=tuple(
            RoundFacts(
                round=entry.round,
                participants=entry.summed,
                training_loss=entry.training_loss,
                accuracy=entry.accuracy,
                evaluated=entry.evaluated,
                began_with=dict(entry.quality),
            )
            for entry in summed[:rounds]
        ),
    )
