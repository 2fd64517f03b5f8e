"""The coordinator's part in one cohort's masks (`crypto.cohort`, the relay's half).

It carries what members say to each other and learns, at the end, which masks are left in the sum.
It holds no secret of its own, and nothing that it could do wrong opens a smaller sum.

    event loop    heard ─┐               ┌─ journal ─ new state ─ messages to members
                  counted ├─▶ steps ─▶ one after another
    thread        …      ─┘    └─ decode, verify, recover, encode ─┘

Steps wait in one queue, in the order in which they came. Their arithmetic, signatures and shares,
runs in a thread, from one frozen state to the next; what they lead to happens on the event loop.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.candidates import Candidate
from coordinator.metrics import CryptoStep, Metrics
from crypto import CryptoError, LocalFault, cohort
from crypto.errors import StaleAttempt, StepRefused
from crypto.masks import Correction
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2

Send = Callable[[str, bytes], None]  # (agent, message)
Remember = Callable[[str, bytes], None]  # (agent, message), before it is acted upon
_Moved = tuple[cohort.RelayState, tuple[cohort.RelayEffect, ...]]


@dataclass(frozen=True)
class _Step:
    """What waits for its turn."""

    move: Callable[[cohort.RelayState], _Moved]  # in a thread; raises Refused
    done: asyncio.Future[None]
    remember: Callable[[], None] = lambda: None
    ours: bool = True


class Masking:
    """One attempt: from its cohort to the correction of its sum."""

    def __init__(
        self,
        attempt: cohort.AttemptId,
        minimum: int,
        candidates: Mapping[str, Candidate],
        send: Send,
        remember: Remember,
        metrics: Metrics,
        groups: int = 1,
    ) -> None:
        self._metrics = metrics
        self._candidates = candidates
        self._send = send
        self._remember = remember
        advertised = [candidate.advertisement for candidate in candidates.values()]
        self._state = cohort.new_attempt(attempt, minimum, advertised, groups)
        self.cohort = self._state.cohort
        self.encoded_cohort = self.cohort.encode()
        self._settled: asyncio.Future[Correction | None] = _future()
        self._steps: asyncio.Queue[_Step] = asyncio.Queue()
        self._closed = False
        self._following = asyncio.create_task(self._follow_all())

    @property
    def identities(self) -> list[control_pb2.IdentityKey]:
        """Each member's identity, in order of slots."""
        return [self._candidates[member.agent_id].identity for member in self.cohort.members]

    @property
    def takes_uploads(self) -> bool:
        """Whether all members have dealt their shares, so that a masked update can be opened."""
        return self._state.phase is not cohort.RelayPhase.SHARING

    # what can happen

    async def heard(self, agent: str, message: bytes) -> None:
        """Carry a member's message on, in its turn; raises Refused for one that it may not send."""

        def move(state: cohort.RelayState) -> _Moved:
            return self._handled(state, _read(state, agent, message))

        step = _Step(move, _future(), lambda: self._remember(agent, message), ours=False)
        self._put(step)
        await step.done

    def counted(self, slot: int, sha256: bytes) -> None:
        """A member's update is in the sum."""
        self._happened(cohort.Uploaded(self.cohort.attempt, slot, sha256))

    def close_uploads(self) -> None:
        """No update is added any more: what is in the sum becomes the accepted list."""
        self._happened(cohort.CloseUploads(self.cohort.attempt))

    def repeat(self, agent: str) -> None:
        """Tell a member that connected again what it may have missed since the cohort."""

        def missed(state: cohort.RelayState) -> _Moved:
            effects = cohort.repeat(state, agent)
            return state, tuple(e for e in effects if not isinstance(e.message, cohort.Cohort))

        self._put(_Step(missed, _future()))

    async def settled(self, seconds: float) -> Correction | None:
        """Wait for enough members to vouch and release; None when the sum cannot be opened."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._settled), seconds)
        except TimeoutError:
            self._happened(cohort.CloseVouching(self.cohort.attempt))
            self._happened(cohort.CloseReleases(self.cohort.attempt))
            return await asyncio.shield(self._settled)

    async def idle(self) -> None:
        """Wait until everything that happened so far was followed."""
        await self._steps.join()

    def close(self) -> None:
        """Follow nothing any more: the attempt is over, or not wanted."""
        self._closed = True
        self._following.cancel()
        while not self._steps.empty():
            _give(self._steps.get_nowait().done, None)
            self._steps.task_done()
        _give(self._settled, None)

    # one after another

    def _happened(self, event: cohort.RelayEvent) -> None:
        self._put(_Step(lambda state: self._handled(state, event), _future()))

    def _put(self, step: _Step) -> None:
        if self._closed:
            _give(step.done, None)
        else:
            self._steps.put_nowait(step)

    async def _follow_all(self) -> None:
        while True:
            step = await self._steps.get()
            try:
                await self._follow(step)
            except Exception as error:
                # A member's step is its sender's to hear of; a fault of ours ends the attempt.
                _fail(self._settled if step.ours else step.done, error)
            finally:
                _give(step.done, None)
                self._steps.task_done()

    async def _follow(self, step: _Step) -> None:
        before, begun = self._state, time.perf_counter()
        after, messages, end = await asyncio.to_thread(_followed, step, before)
        if after is not before:
            step.remember()
        self._state = after
        for agent, message in messages:
            self._send(agent, message)
        if isinstance(end, cohort.Correct):
            seconds = time.perf_counter() - begun
            self._metrics.crypto_seconds.labels(CryptoStep.CORRECT).observe(seconds)
            _give(self._settled, end.correction)
        elif end is not None:
            _give(self._settled, None)

    def _handled(self, state: cohort.RelayState, event: cohort.RelayEvent) -> _Moved:
        try:
            return cohort.handle_relay(state, event, self._signed_by)
        except LocalFault:
            raise
        except (StaleAttempt, StepRefused) as error:
            raise Refused(Reason.WRONG_ROUND, str(error)) from error
        except CryptoError as error:
            raise Refused(Reason.COHORT_REFUSED, str(error)) from error

    def _signed_by(self, agent: str, statement: bytes, signature: bytes) -> bool:
        candidate = self._candidates.get(agent)
        return candidate is not None and candidate.signed(agent, statement, signature)


def _read(state: cohort.RelayState, agent: str, message: bytes) -> cohort.RelayEvent:
    """Read what a member says of itself; raises Refused."""
    try:
        stated = cohort.decode(message)
    except CryptoError as error:
        raise Refused(Reason.MALFORMED, str(error)) from error
    if not isinstance(stated, cohort.Boxes | cohort.Endorsement | cohort.Release):
        raise Refused(Reason.MALFORMED, f"expected no {type(stated).__name__} from a member")
    if stated.slot != state.cohort.slot(agent):
        raise Refused(Reason.COHORT_REFUSED, "expected a message of the agent's own slot")
    return stated


def _followed(
    step: _Step, before: cohort.RelayState
) -> tuple[cohort.RelayState, list[tuple[str, bytes]], cohort.Correct | cohort.Abandon | None]:
    """Return where the step leads, what members are told of it, and how the attempt ends by it."""
    after, effects = step.move(before)
    sends = [effect for effect in effects if isinstance(effect, cohort.Send)]
    end = next((effect for effect in effects if not isinstance(effect, cohort.Send)), None)
    return after, _encoded(sends), end


def _encoded(sends: Iterable[cohort.Send]) -> list[tuple[str, bytes]]:
    """Encode what all are told once."""
    encoded: dict[int, bytes] = {}
    messages = []
    for send in sends:
        if id(send.message) not in encoded:
            encoded[id(send.message)] = send.message.encode()
        messages.append((send.agent_id, encoded[id(send.message)]))
    return messages


def _future() -> "asyncio.Future[Any]":
    """Return a future whose failure nobody needs to look at."""
    future = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return future


def _give(future: "asyncio.Future[Any]", value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
