"""The way in: a finished round's sum is fetched, opened and applied; where terms say so, returned.

A round is applied if it follows the one that the state ends with, and only once.
"""

import asyncio
from pathlib import Path

import crypto
from edge_agent.global_state import LastRound
from edge_agent.invitations import Outcome
from edge_agent.protection import SumRefused
from edge_agent.status import Step
from edge_agent.undertaking import Surroundings, Undertaking
from fedloom.artifacts import ArtifactReference, reference_of
from fedloom.errors import Reason, Refused
from fedloom.quality import mean_quality
from fedloom.v1 import artifact_pb2

_SUM_FILE = "sum.bin"
_OPENED_FILES = "opened-*.bin"


async def apply_round(here: Surroundings, run: Undertaking, outcome: Outcome) -> None:
    """Bring a finished round into the state, unless it is there.

    Raises Refused: STATE_DIVERGED for a round that does not follow, KEY_UNAVAILABLE or KEY_SPENT,
    SUM_NOT_VERIFIED, and what the download refuses.
    """
    last = run.state.last.round
    if outcome.round <= last:
        return
    if outcome.previous_round != last:
        raise Refused(
            Reason.STATE_DIVERGED,
            f"expected the round after {last} next, found that after {outcome.previous_round}",
        )
    run_key = run.key_to_open(outcome.key_id)
    here.report(Step.APPLYING, outcome.round)
    path = here.folder / _SUM_FILE
    await here.transfer.download(outcome.sum, path)
    clip = run.clip(outcome.weight_cap)
    try:
        opened = await asyncio.to_thread(run.protection.open_sum, outcome, clip, run_key, path)
    except SumRefused:
        run.keys.count_refused_sum(outcome.key_id)
        raise
    await asyncio.to_thread(_take_in, here, run, outcome, opened)
    path.unlink()
    here.log.info("applied", round=outcome.round, updates=opened.count)


def _take_in(
    here: Surroundings, run: Undertaking, outcome: Outcome, opened: crypto.OpenedSum
) -> None:
    clip, digest = run.clip(outcome.weight_cap), b""
    kept = _opened_path(here.folder, outcome.round)
    if run.terms.privacy.sums_are_returned:  # first: applying uses up the mean's memory
        digest = run.protection.write_opened(outcome, clip, opened, kept).sha256
    mean, tail = run.protection.split(opened.mean)
    applied = LastRound(
        outcome.round,
        outcome.attempt,
        opened.saturated,
        run.protection.next_clip(clip, opened),
        digest,
        mean_quality(run.terms.evaluation, run.plan.task, tail.tolist(), clip),
    )
    run.memory.settle(outcome.round, outcome.attempt, outcome.slots)
    if run.held is not None:
        run.held.settle(outcome.round, outcome.attempt, outcome.slots)
    run.state.apply(mean, opened.count, applied)
    forget_opened(here.folder, but=kept)


async def return_sum(here: Surroundings, run: Undertaking, round_number: int) -> None:
    """Upload the opened sum of the round that was applied last; raises Refused(NOT_FOUND)."""
    last = run.state.last
    path = _opened_path(here.folder, round_number)
    kept: ArtifactReference | None = None
    if run.terms.privacy.sums_are_returned and last.round == round_number:
        kept = await asyncio.to_thread(reference_of, path)
    if kept is None or kept.sha256 != last.opened_sha256:
        raise Refused(
            Reason.NOT_FOUND,
            f"expected the round applied last, {last.round}, whose opened sum is kept, "
            f"found {round_number}",
        )
    here.report(Step.UPLOADING, round_number, "the opened sum")
    kind = artifact_pb2.UPLOAD_KIND_OPENED_SUM
    await here.upload(kind, (last.round, last.attempt), kept, path)
    here.log.info("sum returned", round=round_number, bytes=kept.size_bytes)
    here.report(Step.WAITING, round_number)


def forget_opened(folder: Path, but: Path | None = None) -> None:
    """Delete the opened sums that nobody will ask for any more."""
    for path in folder.glob(_OPENED_FILES):
        if path != but:
            path.unlink()


def _opened_path(folder: Path, round_number: int) -> Path:
    return folder / _OPENED_FILES.replace("*", str(round_number))
