"""An agent through rounds that a coordinator made by hand lays out: keys, clips, gaps, sums."""

import hashlib
import io
import json
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import crypto
from edge_agent.run_keys import MAX_REFUSED_SUMS
from edge_agent.status import STATUS_FILE
from fedloom.adapters import Theta
from fedloom.errors import Reason, Refused, refusal_details
from fedloom.terms import CLIP_MARGIN, Encoding, LocalTraining, Protection, Release
from fedloom.v1 import artifact_pb2, control_pb2
from tests.integration.engines import Gate
from tests.integration.federation import PARAMETERS, Agent, Federation, until
from tests.integration.rogue import (
    RUN,
    WEIGHT_CAP,
    Rogue,
    Sum,
    context_of,
    encrypted_sum,
    encrypted_update,
    envelope,
    invitation,
    rogue_coordinator,
)

# Adam's bound for a cohort whose largest weight is 32: two steps of 16 samples.
FIRST_CLIP = CLIP_MARGIN * LocalTraining().learning_rate * 2


@pytest.fixture
async def agent(federation: Federation) -> Agent:
    """Return an agent that joined while the product's coordinator served."""
    return await federation.enrol("agent")


@pytest.fixture
async def rogue(federation: Federation, agent: Agent) -> AsyncIterator[Rogue]:
    """Put the hand-made coordinator in the other's place and let the agent come."""
    async with rogue_coordinator(federation) as found:
        agent.start()
        await found.hear("hello")
        yield found
        await agent.stop()


class Rounds:
    """A run in protection `encrypted` with one agent, as an honest coordinator would lay it out."""

    def __init__(self, federation: Federation, agent: Agent, rogue: Rogue) -> None:
        self.federation = federation
        self.agent = agent
        self.rogue = rogue
        self.keys = [1]
        self.history: list[control_pb2.RoundOutcome] = []
        self.clip = FIRST_CLIP
        self.training = LocalTraining()
        self.release = Release.AGENTS

    @property
    def previous(self) -> int:
        """Number of the last round."""
        return self.history[-1].round if self.history else 0

    def invite(self, number: int, **fields: Any) -> None:
        """Invite to a round after all those that were finished."""
        values: dict[str, Any] = {
            "round": number,
            "previous_round": self.previous,
            "envelopes": [envelope(self.agent.identity, RUN, key_id) for key_id in self.keys],
            "history": self.history,
            "training": self.training.to_message(),
            "release": control_pb2.Release.ValueType(self.release),
        }
        message = invitation(self.federation, RUN, Protection.ENCRYPTED, **(values | fields))
        self.rogue.say(invitation=message)

    async def ready(self, number: int) -> control_pb2.Ready:
        """Invite and hear READY."""
        self.invite(number)
        ready = (await self.rogue.hear("ready")).ready
        assert ready.round == number
        return ready

    def form(self, number: int, attempt: int = 1, **fields: Any) -> None:
        """Tell the agent that it is the cohort."""
        values: dict[str, Any] = {
            "round": number,
            "attempt": attempt,
            "members": [self.agent.name],
            "weight_cap": WEIGHT_CAP,
            "clip": self.clip,
        }
        self.rogue.say(cohort=control_pb2.Cohort(run_id=RUN, **(values | fields)))

    async def collect(self, number: int, attempt: int = 1) -> Sum:
        """Form the cohort, take the upload and sum it."""
        self.form(number, attempt)
        received = await self.rogue.uploaded()
        header = received.header
        assert (header.round, header.attempt) == (number, attempt)
        assert header.kind == artifact_pb2.UPLOAD_KIND_UPDATE
        context = context_of(number, self.clip, attempt)
        return encrypted_sum(received.content, context, self.keys[-1])

    def close(self, summed: Sum) -> control_pb2.RoundOutcome:
        """Make the sum history; the next clip follows from what this test knows of the update."""
        outcome = control_pb2.RoundOutcome(
            **summed.fields,
            sum=self.rogue.serve(summed.content),
            previous_round=self.previous,
            key_id=self.keys[-1],
        )
        self.history.append(outcome)
        self.clip = clip_after(self.clip, summed)
        return outcome

    def other_agents_round(self, number: int, update: Theta) -> Sum:
        """Finish a round without the agent."""
        context = context_of(number, self.clip)
        content = encrypted_update(update, context, self.keys[-1])
        summed = encrypted_sum(content, context, self.keys[-1])
        self.close(summed)
        return summed

    async def applied(self, outcome: control_pb2.RoundOutcome) -> control_pb2.Applied:
        """Announce the result and hear that it was applied."""
        self.rogue.say(result=control_pb2.Result(run_id=RUN, outcome=outcome))
        applied = (await self.rogue.hear("applied")).applied
        assert applied.round == outcome.round
        return applied

    async def whole(self, number: int) -> tuple[Sum, control_pb2.Applied]:
        """Go through one round."""
        await self.ready(number)
        summed = await self.collect(number)
        return summed, await self.applied(self.close(summed))

    async def restart(self) -> None:
        """Let the device begin anew as another process would."""
        await self.agent.stop()
        self.agent.start()
        await self.rogue.hear("hello")


@pytest.fixture
def rounds(federation: Federation, agent: Agent, rogue: Rogue) -> Rounds:
    """Return the run before its first round."""
    return Rounds(federation, agent, rogue)


def clip_after(clip: float, summed: Sum) -> float:
    """Derive the next clip anew: the power of two above the largest value, as float32."""
    [place] = [place for place, count in enumerate(summed.opened.exponents) if count]
    return float(np.float32(clip)) * 2.0 ** (place - 10)


# gaps


async def test_numbers_may_have_gaps(rounds: Rounds, federation: Federation) -> None:
    first, _ = await rounds.whole(1)
    second, applied = await rounds.whole(4)
    third, last = await rounds.whole(9)
    theta = federation.initial_theta()
    for summed in (first, second, third):
        theta = theta + summed.opened.mean
    assert last.state_sha256 != applied.state_sha256
    rounds.rogue.say(
        finished=control_pb2.Finished(run_id=RUN, outcome=control_pb2.RUN_OUTCOME_COMPLETED)
    )
    await rounds.agent.finished()
    assert np.array_equal(rounds.agent.theta(RUN), theta)


@pytest.mark.parametrize("previous", [0, 2])
async def test_training_starts_from_the_state_that_the_invitation_names(
    rounds: Rounds, previous: int
) -> None:
    await rounds.whole(1)
    rounds.invite(3, previous_round=previous)
    assert await rounds.rogue.hear_refusal("expected the state after round") is (
        Reason.STATE_DIVERGED
    )
    await rounds.ready(3)


async def test_a_result_that_does_not_follow_the_state_is_not_applied(rounds: Rounds) -> None:
    first, applied = await rounds.whole(1)
    outcome = control_pb2.RoundOutcome()
    outcome.CopyFrom(rounds.history[0])
    outcome.round, outcome.previous_round = 3, 2
    rounds.rogue.say(result=control_pb2.Result(run_id=RUN, outcome=outcome))
    assert await rounds.rogue.hear_refusal() is Reason.STATE_DIVERGED
    again = await rounds.applied(rounds.history[0])
    assert again == applied
    assert first.opened.count == 1


async def test_a_result_that_the_state_has_left_behind_is_declined(rounds: Rounds) -> None:
    await rounds.whole(1)
    await rounds.whole(2)
    rounds.rogue.say(result=control_pb2.Result(run_id=RUN, outcome=rounds.history[0]))
    assert await rounds.rogue.hear_refusal() is Reason.WRONG_ROUND


async def test_a_late_agent_applies_a_history_with_gaps_and_two_keys(
    rounds: Rounds, federation: Federation
) -> None:
    generator = np.random.default_rng(5)
    theta = federation.initial_theta()
    for number, keys in ((2, [1]), (3, [1]), (7, [1, 2])):
        rounds.keys = keys
        update = generator.normal(0, rounds.clip, PARAMETERS).astype(np.float32)
        theta = theta + rounds.other_agents_round(number, update).opened.mean
    await rounds.ready(8)
    assert np.array_equal(rounds.agent.engine.history[-1].theta, theta)
    assert await rounds.collect(8)  # its clip is the one that the history implies


# clips


@pytest.mark.parametrize("restarted", [False, True])
async def test_each_round_has_the_clip_that_the_last_sum_implies(
    rounds: Rounds, restarted: bool
) -> None:
    clips = [rounds.clip]
    for number in (1, 2, 3):
        summed, applied = await rounds.whole(number)
        assert applied.next_clip == rounds.clip
        assert applied.saturated == summed.opened.saturated
        # The second clip holds every value; the first need not: that is what `saturated` counts.
        assert summed.opened.saturated == 0 or number < 3
        if restarted:
            await rounds.restart()
        clips.append(rounds.clip)
        await rounds.ready(number + 1)
        for wrong in {*clips[:-1], math.nextafter(rounds.clip, 1), 0.0} - {rounds.clip}:
            rounds.form(number + 1, clip=wrong)
            assert await rounds.rogue.hear_refusal("expected clip") is Reason.MALFORMED
    assert len(set(clips)) > 1


async def test_a_stated_clip_stays(rounds: Rounds) -> None:
    encoding = replace(Encoding(Protection.ENCRYPTED), clip=0.5).to_message()
    rounds.clip = 0.5
    for number in (1, 2):
        rounds.invite(number, encoding=encoding)
        await rounds.rogue.hear("ready")
        applied = await rounds.applied(rounds.close(await rounds.collect(number)))
        assert applied.next_clip == 0
        rounds.clip = 0.5


# keys


async def test_a_device_never_goes_back_to_an_older_key(rounds: Rounds) -> None:
    await rounds.whole(1)
    rounds.keys = [1, 2]
    await rounds.whole(2)
    rounds.keys = [1]
    for restart in (False, True):
        if restart:
            await rounds.restart()
        rounds.invite(3, history=[])
        assert await rounds.rogue.hear_refusal("run key 2") is Reason.KEY_UNAVAILABLE
        rounds.form(3)
        assert await rounds.rogue.hear_refusal() in (Reason.WRONG_ROUND, Reason.KEY_UNAVAILABLE)
    rounds.keys = [2]
    await rounds.ready(3)
    kept = rounds.agent.home / "runs" / RUN.hex() / "run-keys.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    assert json.loads(kept.read_text()) == {"newest_given": 2, "refused_sums": {}}


async def test_a_history_whose_key_is_missing_is_declined(rounds: Rounds) -> None:
    update = np.full(PARAMETERS, 1e-3, np.float32)
    rounds.other_agents_round(1, update)
    rounds.keys = [2]
    rounds.other_agents_round(2, update)
    rounds.invite(3)
    assert await rounds.rogue.hear_refusal("run key 1") is Reason.KEY_UNAVAILABLE
    assert rounds.agent.engine.history == []
    rounds.keys = [1, 2]
    await rounds.ready(3)


@pytest.mark.parametrize("numbers", [[2, 1], [1, 1], [0, 1]])
async def test_keys_come_in_ascending_order(rounds: Rounds, numbers: list[int]) -> None:
    rounds.keys = numbers
    rounds.invite(1)
    assert await rounds.rogue.hear_refusal() is Reason.MALFORMED


def tampered(rounds: Rounds, summed: Sum, place: int) -> control_pb2.Result:
    """Announce a sum that is not that of its updates."""
    content = bytearray(summed.content)
    content[55 + 4 * place] ^= 0x80  # bit 35 of a residue: far above the noise
    reference = rounds.rogue.serve(bytes(content))
    outcome = control_pb2.RoundOutcome(**summed.fields, sum=reference, key_id=1)
    return control_pb2.Result(run_id=RUN, outcome=outcome)


async def test_a_spent_key_is_declined_and_the_next_one_taken(rounds: Rounds) -> None:
    await rounds.ready(1)
    summed = await rounds.collect(1)
    rogue = rounds.rogue
    for place in range(MAX_REFUSED_SUMS):
        if place == 3:
            await rounds.restart()
        rogue.say(result=tampered(rounds, summed, place))
        assert await rogue.hear_refusal() is Reason.SUM_NOT_VERIFIED
    rounds.invite(2)
    assert await rogue.hear_refusal("key 1") is Reason.KEY_SPENT
    assert rounds.agent.engine.begun == 1
    await rounds.applied(rounds.close(summed))  # what others can open, it still catches up with
    rounds.keys = [1, 2]
    await rounds.whole(2)


async def test_a_key_answers_no_more_than_a_bounded_number_of_wrong_sums(rounds: Rounds) -> None:
    await rounds.ready(1)
    summed = await rounds.collect(1)
    for place in range(2 * MAX_REFUSED_SUMS):
        rounds.rogue.say(result=tampered(rounds, summed, place))
        assert await rounds.rogue.hear_refusal() is Reason.SUM_NOT_VERIFIED
    rounds.rogue.say(result=control_pb2.Result(run_id=RUN, outcome=rounds.close(summed)))
    assert await rounds.rogue.hear_refusal("key 1") is Reason.KEY_SPENT


async def test_a_key_does_not_come_back_under_another_number(rounds: Rounds) -> None:
    agent = rounds.agent
    recipient = control_pb2.KeyRecipient(
        agent_id=agent.name, exchange_key=agent.identity.advertised_exchange_key()
    )
    old = envelope(agent.identity, RUN, 1)
    rounds.rogue.say(
        wrap_key=control_pb2.WrapKey(run_id=RUN, key_id=2, recipients=[recipient], envelope=old)
    )
    assert await rounds.rogue.hear_refusal("run key 2") is Reason.MALFORMED
    rounds.rogue.say(
        wrap_key=control_pb2.WrapKey(run_id=RUN, key_id=1, recipients=[recipient], envelope=old)
    )
    [answer] = (await rounds.rogue.hear("wrapped_key")).wrapped_key.envelopes
    assert answer.key_id == 1


# rounding


@pytest.mark.parametrize("restarted", [False, True])
async def test_an_update_has_the_same_levels_in_every_attempt(
    rounds: Rounds, restarted: bool
) -> None:
    await rounds.ready(1)
    first = await rounds.collect(1)
    if restarted:
        await rounds.restart()
        await rounds.ready(1)
    second = await rounds.collect(1, attempt=2)
    assert first.content != second.content
    assert np.array_equal(first.opened.mean, second.opened.mean)
    update = rounds.agent.engine.history[-1].update.delta
    assert not np.array_equal(first.opened.mean, update)  # rounded it was


async def test_a_device_that_was_started_again_gives_the_update_that_it_promised(
    rounds: Rounds,
) -> None:
    await rounds.ready(1)
    await rounds.restart()
    again = await rounds.collect(1)
    first, second = rounds.agent.engine.history
    assert np.array_equal(first.update.delta, second.update.delta)
    await rounds.applied(rounds.close(again))
    rounds.form(1)
    assert await rounds.rogue.hear_refusal() is Reason.WRONG_ROUND


# the opened sum


async def returned(rounds: Rounds, number: int) -> crypto.OpenedSum:
    """Ask for a round's opened sum and read it as protection `plain` reads sums."""
    rounds.rogue.say(return_sum=control_pb2.ReturnSum(run_id=RUN, round=number))
    received = await rounds.rogue.uploaded()
    header = received.header
    assert (header.kind, header.round) == (artifact_pb2.UPLOAD_KIND_OPENED_SUM, number)
    [outcome] = [outcome for outcome in rounds.history if outcome.round == number]
    context = context_of(number, 1.0, outcome.attempt)
    return crypto.protection("plain").open_sum(context, None, (0,), io.BytesIO(received.content))


async def gone(rounds: Rounds, number: int) -> None:
    """Ask for an opened sum that the device does not have."""
    rounds.rogue.say(return_sum=control_pb2.ReturnSum(run_id=RUN, round=number))
    assert await rounds.rogue.hear_refusal() is Reason.NOT_FOUND


async def permit_release(rounds: Rounds) -> None:
    """Let the device's owner permit what the run asks for."""
    rounds.agent.permitted_release = rounds.release = Release.COORDINATOR
    await rounds.restart()


async def test_a_run_that_returns_its_sums_is_declined_unless_the_owner_permits_it(
    rounds: Rounds,
) -> None:
    rounds.release = Release.COORDINATOR
    rounds.invite(1)
    assert await rounds.rogue.hear_refusal("policy.release") is Reason.PROTECTION_TOO_WEAK
    assert rounds.agent.engine.history == []
    assert not (rounds.agent.home / "plans").exists()
    await permit_release(rounds)
    await rounds.ready(1)


async def test_who_reads_the_sums_anyway_needs_no_permission(
    rounds: Rounds, federation: Federation
) -> None:
    message = invitation(federation, RUN, Protection.PLAIN)
    message.release = control_pb2.RELEASE_COORDINATOR
    rounds.rogue.say(invitation=message)
    await rounds.rogue.hear("ready")


async def test_the_opened_sum_is_returned_until_the_next_round_is_applied(rounds: Rounds) -> None:
    await permit_release(rounds)
    await gone_before_any_invitation(rounds)
    first, applied = await rounds.whole(1)
    for repetition in range(3):
        if repetition == 2:
            await rounds.restart()
        opened = await returned(rounds, 1)
        assert np.array_equal(opened.mean, first.opened.mean)
        assert opened.total_weight == first.opened.total_weight
    again = await rounds.applied(rounds.history[0])
    assert again.opened_sha256 == applied.opened_sha256
    second, _ = await rounds.whole(3)
    [kept] = (rounds.agent.home / "runs").rglob("opened-*")
    assert kept.name == "opened-3.bin"
    assert np.array_equal((await returned(rounds, 3)).mean, second.opened.mean)
    await gone(rounds, 1)
    await gone(rounds, 2)
    finished = control_pb2.Finished(run_id=RUN, outcome=control_pb2.RUN_OUTCOME_COMPLETED)
    rounds.rogue.say(finished=finished)
    await rounds.agent.finished()
    await gone(rounds, 3)
    assert not list((rounds.agent.home / "runs").rglob("opened-*"))


async def gone_before_any_invitation(rounds: Rounds) -> None:
    """Ask a device that has applied nothing."""
    rounds.rogue.say(return_sum=control_pb2.ReturnSum(run_id=RUN, round=1))
    assert await rounds.rogue.hear_refusal() is Reason.WRONG_ROUND


async def test_all_agents_report_the_digest_of_what_is_returned(rounds: Rounds) -> None:
    await permit_release(rounds)
    _, applied = await rounds.whole(1)
    rounds.rogue.say(return_sum=control_pb2.ReturnSum(run_id=RUN, round=1))
    received = await rounds.rogue.uploaded()
    assert hashlib.sha256(received.content).digest() == applied.opened_sha256
    assert received.header.sha256 == applied.opened_sha256


async def test_a_run_that_releases_to_agents_returns_nothing(rounds: Rounds) -> None:
    _, applied = await rounds.whole(1)
    assert applied.opened_sha256 == b""
    await gone(rounds, 1)
    assert not list((rounds.agent.home / "runs").rglob("opened-*"))


async def test_an_opened_sum_that_has_changed_on_the_disk_is_not_returned(rounds: Rounds) -> None:
    await permit_release(rounds)
    await rounds.whole(1)
    [kept] = (rounds.agent.home / "runs").rglob("opened-*")
    kept.write_bytes(bytes([kept.read_bytes()[0] ^ 1]) + kept.read_bytes()[1:])
    await gone(rounds, 1)


# waiting


def status_of(agent: Agent) -> dict[str, Any]:
    """Return what the device tells of itself."""
    told: dict[str, Any] = json.loads((agent.home / STATUS_FILE).read_text())
    return told


def closed(number: int) -> control_pb2.Waiting:
    """Close a round without the agent."""
    return control_pb2.Waiting(run_id=RUN, round=number, cause=control_pb2.WAIT_CAUSE_ROUND_CLOSED)


async def test_a_round_that_is_closed_is_trained_for_no_longer(rounds: Rounds) -> None:
    engine, rogue = rounds.agent.engine, rounds.rogue
    engine.may_finish.clear()
    rounds.invite(1)
    await until("the training", engine.training.is_set)
    await until("the status", lambda: status_of(rounds.agent)["step"] == "training")
    rogue.say(waiting=closed(1))
    await until("the end of it", lambda: status_of(rounds.agent)["step"] == "waiting")
    assert "closed without" in status_of(rounds.agent)["step_cause"]
    engine.may_finish.set()
    rounds.form(1)
    assert await rogue.hear_refusal() is Reason.WRONG_ROUND  # and no READY before it
    await rounds.ready(2)
    assert engine.begun == 2


async def test_the_update_of_a_round_that_is_closed_is_dropped(rounds: Rounds) -> None:
    await rounds.ready(1)
    await rounds.collect(1)
    rounds.rogue.say(waiting=closed(1))
    rounds.form(1)
    assert await rounds.rogue.hear_refusal() is Reason.WRONG_ROUND
    await rounds.ready(1)  # invited to it after all
    assert rounds.agent.engine.begun == 2


async def test_a_round_that_is_closed_before_its_turn_is_not_trained_for(rounds: Rounds) -> None:
    engine, rogue = rounds.agent.engine, rounds.rogue
    engine.may_finish.clear()
    rounds.invite(1)
    await until("the training", engine.training.is_set)
    gate = Gate()
    engine.evaluation_gate = gate
    engine.may_finish.set()
    await rogue.hear("ready")
    summed = await rounds.collect(1)
    rogue.say(result=control_pb2.Result(run_id=RUN, outcome=rounds.close(summed)))
    await until("the evaluation", gate.entered.is_set)
    rounds.invite(2)  # has to wait for the evaluation
    rogue.say(waiting=closed(2))
    await until("the cause", lambda: "closed" in status_of(rounds.agent)["step_cause"])
    gate.open.set()
    await rogue.hear("applied")
    await rounds.ready(3)
    assert engine.begun == 2


@pytest.mark.parametrize("cause", [*control_pb2.WaitCause.values(), 99])
async def test_why_it_waits_is_kept_for_a_person(rounds: Rounds, cause: int) -> None:
    before = status_of(rounds.agent)["step_cause"]
    waiting = control_pb2.Waiting(run_id=RUN, round=7, cause=cause)
    rounds.rogue.say(waiting=waiting)
    await until("the cause", lambda: status_of(rounds.agent)["step_cause"] != before)
    told = status_of(rounds.agent)
    assert (told["step"], told["run"], told["round"]) == ("waiting", RUN.hex(), 7)
    await rounds.ready(7)


async def test_why_a_step_was_declined_stays_visible_while_it_waits(rounds: Rounds) -> None:
    rogue = rounds.rogue
    rounds.invite(1, envelopes=[])
    assert await rogue.hear_refusal() is Reason.KEY_UNAVAILABLE
    told = status_of(rounds.agent)
    assert told["step"] == "declined"
    assert told["step_cause"].startswith("KEY_UNAVAILABLE: ")
    for number, expected in ((1, told["step_cause"]), (2, "others were chosen")):
        cause = control_pb2.WAIT_CAUSE_NOT_SELECTED
        rogue.say(waiting=control_pb2.Waiting(run_id=RUN, round=number, cause=cause))
        rogue.say(wrap_key=control_pb2.WrapKey(run_id=RUN, key_id=1))
        await rogue.hear("wrapped_key")  # by then the cause was read
        assert status_of(rounds.agent)["step_cause"].startswith(expected)


# refusals that no second try can mend

ENDING = [Reason.BANNED, Reason.CERTIFICATE_EXPIRED, Reason.PROTOCOL_UNSUPPORTED]


@pytest.mark.parametrize("reason", ENDING)
@pytest.mark.parametrize("where", ["step", "stream", "upload"])
async def test_a_refusal_that_no_second_try_can_mend_ends_the_session(
    rounds: Rounds, reason: Reason, where: str
) -> None:
    refused, rogue = Refused(reason, "as the test says"), rounds.rogue
    if where == "step":
        rogue.say(refusal=control_pb2.StepRefusal(details=refusal_details(refused)))
    elif where == "stream":
        await rounds.agent.stop()
        rogue.refuses_streams = refused
        rounds.agent.start()
    else:
        rogue.refuses_uploads = refused
        await rounds.ready(1)
        rounds.form(1)
    error = await rounds.agent.ended()
    assert isinstance(error, Refused)
    assert (error.reason, error.subject) == (reason, "as the test says")
    told = status_of(rounds.agent)
    assert (told["link"], told["link_cause"]) == ("ended", str(error))


async def test_an_update_is_given_to_no_group_of_fewer_than_three(rounds: Rounds) -> None:
    """Under the run's key alone, too, where no cohort's protocol says who is in which group."""
    rounds.training = LocalTraining(groups=3)
    await rounds.ready(1)
    rounds.form(1, members=[rounds.agent.name, *(f"other-{i}" for i in range(7))])
    assert await rounds.rogue.hear_refusal("expected 9 members") is Reason.COHORT_REFUSED
    rounds.form(1, members=[rounds.agent.name, *(f"other-{i}" for i in range(8))])
    assert (await rounds.rogue.uploaded()).header.round == 1


async def test_a_round_of_groups_of_fewer_than_three_is_not_opened(rounds: Rounds) -> None:
    rounds.training = LocalTraining(groups=3)
    update = np.full(PARAMETERS, 1e-3, np.float32)
    summed = rounds.other_agents_round(1, update)
    assert len(summed.fields["slots"]) == 1
    rounds.invite(2)
    assert await rounds.rogue.hear_refusal() is Reason.SUM_NOT_VERIFIED
    assert rounds.agent.engine.history == []
