"""What the updates and the sum of a cohort are bound to, from the run's terms."""

import crypto
from coordinator.config import RunConfig
from coordinator.run_state import RunState
from coordinator.store import RoundRecord
from fedloom.compression import Compression
from fedloom.plans import Plan
from fedloom.quality import tail_length
from fedloom.strategies import moved_length, update_length
from fedloom.strategies.compressed import listed_values
from fedloom.terms import clip_of


def encoded_length(config: RunConfig, plan: Plan, before: int) -> int:
    """Return how many values an update has in the round that `before` others precede.

    They are what the strategy sends, and the tail of quality.
    """
    rule = update_length(config.training, plan.layout, before)
    return rule + tail_length(config.evaluation, plan.task)


def summed_length(config: RunConfig, plan: Plan, before: int) -> int:
    """Return how many values that round's sum has: more where the server moves a residual."""
    moved = moved_length(config.training, plan.layout, before)
    return encoded_length(config, plan, before) + moved


def context_of_cohort(
    run_id: bytes, config: RunConfig, plan: Plan, state: RunState, cohort_digest: bytes
) -> crypto.UpdateContext:
    """Return the context of the state's open cohort; for its clip see `Cohort.clip`."""
    encoding, tail = config.encoding, tail_length(config.evaluation, plan.task)
    length = encoded_length(config, plan, state.completed)
    derived = 0.0 if encoding.clip else state.clip
    return crypto.UpdateContext(
        run_id=run_id,
        round=state.round,
        attempt=state.attempt,
        parameter_count=length,
        capacity=encoding.capacity,
        weight_cap=state.weight_cap,
        clip=derived or clip_of(encoding, config.training, state.weight_cap),
        update_bits=encoding.update_bits,
        cohort=cohort_digest,
        tail_length=tail,
        listed=listed_values(config.training, length - tail),
        quantised=config.training.compression is Compression.QUANTISED,
    )


def context_of_round(
    run_id: bytes, config: RunConfig, plan: Plan, record: RoundRecord, before: int
) -> crypto.UpdateContext:
    """Return the context of a round's sum that `before` others precede in the run's history."""
    tail = tail_length(config.evaluation, plan.task)
    length = summed_length(config, plan, before)
    return crypto.UpdateContext(
        run_id=run_id,
        round=record.round,
        attempt=record.attempt,
        parameter_count=length,
        capacity=config.encoding.capacity,
        weight_cap=record.weight_cap,
        clip=record.clip,
        update_bits=config.encoding.update_bits,
        cohort=record.cohort_digest,
        tail_length=tail,
        listed=listed_values(config.training, length - tail),
        quantised=config.training.compression is Compression.QUANTISED,
    )
