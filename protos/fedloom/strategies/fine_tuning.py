"""Local fine-tuning: Wang et al., arXiv:1910.10252. Each device goes on alone at the end.

    theta_k <- theta, then some steps on the device's own data

with the run's optimiser and learning rate, and none of its strategy's terms.
"""

from dataclasses import replace

from fedloom.terms import (
    STRATEGIES_WITH,
    LocalTraining,
    Personal,
    Schedule,
    StalenessWeighting,
    Strategy,
)


def fine_tuning_terms(terms: LocalTraining) -> LocalTraining:
    """Return how a device trains the finished run's model: plainly, for `fine_tune_steps`."""
    return replace(
        terms,
        staleness_weighting=StalenessWeighting.CONSTANT,
        **dict.fromkeys(STRATEGIES_WITH, 0),  # type: ignore[arg-type]
        strategy=Strategy.FED_AVG,
        server_learning_rate=1.0,
        epochs=1,
        max_steps=0,
        local_steps=terms.fine_tune_steps,
        warmup_steps=min(terms.warmup_steps, terms.fine_tune_steps - 1),
        round_schedule=Schedule.CONSTANT,
        personal=Personal.NONE,
        personal_lambda=0.0,
        head_steps=0,
    )
