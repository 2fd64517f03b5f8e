"""Who learns what from the updates of a run: the statement that every command prints."""

from dataclasses import dataclass

from fedloom.terms import Protection


@dataclass(frozen=True)
class PrivacyStatement:
    """What each party can read; metrics (loss, accuracy, weight class) are told in clear."""

    coordinator: str
    coordinator_and_an_agent: str
    agents: str


STATEMENTS: dict[Protection, PrivacyStatement] = {
    Protection.PLAIN: PrivacyStatement(
        coordinator="every update",
        coordinator_and_an_agent="every update",
        agents="the mean of each round's updates",
    ),
    Protection.MASKED: PrivacyStatement(
        coordinator="the sum",
        coordinator_and_an_agent="the sum of the others",
        agents="the mean of each round's updates",
    ),
    Protection.SEALED: PrivacyStatement(
        coordinator="nothing",
        coordinator_and_an_agent="the sum of the others",
        agents="the mean of each round's updates",
    ),
    Protection.ENCRYPTED: PrivacyStatement(
        coordinator="nothing",
        coordinator_and_an_agent="every update (the agents share one key)",
        agents="the mean of each round's updates",
    ),
}
