"""The agent's life: connect, take part in runs, connect again."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import grpc
import structlog

from edge_agent.absence import Absence
from edge_agent.availability import local_now
from edge_agent.capability import told_capability
from edge_agent.connection import Backoff, Closings, Unreachable, open_channel
from edge_agent.enrolment import until_renewed
from edge_agent.identity import Identity
from edge_agent.invitations import is_asynchronous, read_run_id, unfinished_runs
from edge_agent.participation import Device, Participation
from edge_agent.run_keys import share_run_key
from edge_agent.status import Link, StatusFile, Step, wait_cause
from edge_agent.transfer import Transfer
from edge_agent.undertaking import Interrupted
from fedloom.errors import (
    RULES,
    FedloomError,
    Reaction,
    Reason,
    Refused,
    refusal_details,
    refused_from_details,
)
from fedloom.terms import Protection
from fedloom.v1 import control_pb2, control_pb2_grpc
from fedloom.version import PROTOCOL_VERSION, software

FIRST_BACKOFF_SECONDS = 0.2
LAST_BACKOFF_SECONDS = 30.0
GOODBYE_SECONDS = 5.0  # for the coordinator to end a stream that we end
PROGRESS_SECONDS = 1.0  # how often progress is looked at while training
_Steps = asyncio.Queue[control_pb2.ConnectResponse]
_Follow = Callable[[control_pb2.ConnectResponse], Awaitable[None]]
_NO_ROUND = 1 << 32  # after every one
_log = structlog.get_logger()


class Session:
    """Takes part in runs until it is told to stop."""

    def __init__(self, device: Device, protections: frozenset[Protection]) -> None:
        self._device = device
        self._protections = protections
        self._status = StatusFile(device.home)
        self._run: Participation | None = None
        self._closed: tuple[bytes, int] | None = None  # a round, before its invitation's turn came
        self._outbox: asyncio.Queue[control_pb2.ConnectRequest | None] = asyncio.Queue()
        self._newest: tuple[bytes, int] = b"", 0  # run and round of the invitation read last
        self._steps: _Steps = asyncio.Queue()
        self._key_requests: _Steps = asyncio.Queue()
        self._at_work = asyncio.Lock()  # held during a step
        self._heartbeat_seconds = 15.0
        self._absence = Absence(device.availability, self._status)
        self._departing = False
        self.finished: asyncio.Queue[control_pb2.Finished] = asyncio.Queue()

    async def run(self) -> None:
        """Stay connected; raises Refused or Unreachable when trying again cannot help."""
        try:
            await self._stay()
        except FedloomError as error:
            self._status.link(Link.ENDED, str(error))
            raise

    async def _stay(self) -> None:
        """Stay connected while this device takes part, with the newest certificate."""
        while True:
            await self._absence.until_available()
            self._departing = False
            self._absence.needed()
            connected = asyncio.create_task(self._stay_connected())
            renewed = asyncio.create_task(self._renewed())
            departing = asyncio.create_task(self._departure())
            tasks, away_seconds = {connected, renewed, departing}, 0.0
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if connected.done():
                    return connected.result()
                if renewed.done():
                    # The old connection ends before the new key is used: then the old one is out.
                    self._device = replace(self._device, identity=renewed.result())
                else:
                    away_seconds = departing.result()
                    await self._say_goodbye(connected)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            self._run = None  # it knew the old connection; the next one reads the disk
            await self._absence.pass_by(away_seconds)

    async def _departure(self) -> float:
        """Return for how many seconds to be away, when that is due and no step is being done."""
        while True:
            if why := self._absence.why_not_now():
                self._stop_taking_part(why)
                async with self._at_work:
                    return 0.0
            if self._absence.seconds:
                async with self._at_work:
                    if self._absence.seconds and self._steps.empty():
                        return self._absence.seconds
            await self._absence.look_again()

    def _stop_taking_part(self, why: str) -> None:
        """Decline the round in hand, so that nobody waits for it, and stop its training."""
        _log.info("leaving", cause=why)
        run = self._run
        if run is not None and run.round:
            run.interrupt()
            refusal = control_pb2.StepRefusal(
                run_id=run.run_id,
                round=run.round,
                details=refusal_details(Refused(Reason.BUSY, why)),
            )
            self._send(control_pb2.ConnectRequest(refusal=refusal))

    async def _say_goodbye(self, connected: asyncio.Task[None]) -> None:
        """End the stream after what was said on it; raises what the coordinator ends it with."""
        self._departing = True
        self._outbox.put_nowait(None)
        await asyncio.wait({connected}, timeout=GOODBYE_SECONDS)
        if connected.done():
            connected.result()

    async def _renewed(self) -> Identity:
        """Return a newer identity when there is one and no step is being done."""
        identity = await until_renewed(self._device.home, self._device.identity)
        async with self._at_work:
            return identity

    async def _stay_connected(self) -> None:
        address = self._device.identity.control_address
        backoff, closings = Backoff(FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS), Closings()
        credentials = self._device.identity.channel_credentials()
        async with open_channel(address, credentials) as channel:
            in_turn = partial(self._in_turn, Transfer(channel, address))
            workers = {
                asyncio.create_task(self._work(self._steps, in_turn)),
                # Beside the steps: nobody shall wait for our training to have a key.
                asyncio.create_task(self._work(self._key_requests, self._share_key)),
            }
            try:
                while True:
                    self._device.identity.require_valid(datetime.now(UTC))
                    backoff.attempt()
                    try:
                        await self._converse(channel, workers)
                        cause: FedloomError = Unreachable(address, "stream ended", hopeless=False)
                    except grpc.aio.AioRpcError as error:
                        cause = closings.explained(error, address)
                    _raise_if_hopeless(cause)
                    if self._departing:
                        return
                    self._status.link(Link.RECONNECTING, str(cause))
                    backoff.spread(self._absence.spread_seconds, self._absence.longest_pause)
                    seconds = backoff.pause(cause)
                    _log.info("reconnecting", cause=str(cause), seconds=round(seconds, 1))
                    await asyncio.sleep(seconds)
            finally:
                for worker in workers:
                    worker.cancel()
                if self._run is not None:
                    self._run.interrupt()
                await asyncio.wait(workers)  # a later one finds on the disk what this one promised

    async def _converse(self, channel: grpc.aio.Channel, workers: set[asyncio.Task[None]]) -> None:
        """Hold one control stream until it ends; a dead worker ends it with its error."""
        self._outbox = asyncio.Queue()
        self._absence.needed()
        self._outbox.put_nowait(self._hello())
        call = control_pb2_grpc.ControlServiceStub(channel).Connect(self._requests())
        heart = asyncio.create_task(self._beat())
        reader = asyncio.create_task(self._read(call))
        try:
            await asyncio.wait({reader, *workers}, return_when=asyncio.FIRST_COMPLETED)
            for worker in workers:
                if worker.done():
                    worker.result()
            await reader
        finally:
            heart.cancel()
            reader.cancel()
            call.cancel()
            self._outbox.put_nowait(None)

    def _hello(self) -> control_pb2.ConnectRequest:
        hello = control_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            software=software(),
            protections=[control_pb2.Protection.ValueType(p) for p in sorted(self._protections)],
        )
        if self._protections != {Protection.PLAIN}:
            hello.exchange_key.CopyFrom(self._device.identity.advertised_exchange_key())
        device = self._device
        if device.tells_capability:
            budget = device.resources.budget_bytes
            told = told_capability(device.home, device.engine_name, budget)
            hello.capability.CopyFrom(told)
        left = device.availability.seconds_left(local_now())
        if left is not None:
            hello.availability.seconds_left = -int(-left // 60) * 60
        hello.unfinished_run_ids.extend(unfinished_runs(self._device.home / "runs"))
        return control_pb2.ConnectRequest(hello=hello)

    async def _requests(self) -> AsyncIterator[control_pb2.ConnectRequest]:
        outbox = self._outbox
        while (message := await outbox.get()) is not None:
            yield message

    async def _beat(self) -> None:
        """Tell that we live, and how far training is whenever it moved by a twentieth."""
        told, silent = 0.0, 0.0
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            silent += PROGRESS_SECONDS
            run = self._run
            progress = 0.0 if run is None else run.progress
            self._status.progress(progress)
            if abs(progress - told) < 0.05 and silent < self._heartbeat_seconds:
                continue
            beat = control_pb2.Heartbeat(progress=progress)
            if run is not None:
                beat.run_id, beat.round = run.run_id, run.round
            self._send(control_pb2.ConnectRequest(heartbeat=beat))
            told, silent = progress, 0.0

    def _send(self, message: control_pb2.ConnectRequest) -> None:
        self._outbox.put_nowait(message)

    async def _read(
        self,
        call: grpc.aio.StreamStreamCall[control_pb2.ConnectRequest, control_pb2.ConnectResponse],
    ) -> None:
        async for message in call:
            match message.WhichOneof("step"):
                case "welcome":
                    for queue in (self._steps, self._key_requests):
                        while not queue.empty():  # the coordinator repeats what it still wants
                            queue.get_nowait()
                    seconds = message.welcome.heartbeat_interval.ToTimedelta().total_seconds()
                    self._heartbeat_seconds = max(1.0, seconds)
                    self._status.link(Link.CONNECTED)
                    _log.info("connected", agent=self._device.identity.agent_id)
                case "waiting":
                    self._wait(message.waiting)
                case "refusal":
                    self._react(refused_from_details(message.refusal.details))
                case None:
                    _log.info("unknown step ignored")  # a newer coordinator's
                case "wrap_key":
                    self._key_requests.put_nowait(message)
                case "invitation" | "result" | "finished":
                    self._absence.needed()
                    self._interrupt_if_past(message)
                    self._steps.put_nowait(message)
                case _:
                    self._absence.needed()
                    self._steps.put_nowait(message)

    def _react(self, refused: Refused) -> None:
        _log.warning("step refused", refusal=str(refused))
        match RULES[refused.reason].reaction:
            case Reaction.STOP | Reaction.ENROL | Reaction.UPGRADE:
                raise refused
            case Reaction.RESYNC:
                if self._run is not None:
                    self._run.forget_state()
            case Reaction.SKIP_STEP | Reaction.RECONNECT:
                # It is asked for again if it is still wanted; an update that is too old is not.
                if refused.reason is Reason.DEADLINE_PASSED and self._run is not None:
                    self._run.drop_update()

    def _wait(self, waiting: control_pb2.Waiting) -> None:
        """Keep the cause for a person; a round that was closed needs no training any more."""
        cause, run = wait_cause(waiting.cause), self._run
        _log.info("waiting", run=waiting.run_id.hex()[:8], round=waiting.round, cause=cause)
        if waiting.cause == control_pb2.WAIT_CAUSE_ROUND_CLOSED:
            self._closed = (waiting.run_id, waiting.round)
            if run is not None and run.run_id == waiting.run_id:
                run.round_closed(waiting.round)
        if run is None or not run.trains_on:
            self._status.step(Step.WAITING, waiting.run_id, waiting.round, cause)
        self._absence.told(waiting.come_back_seconds, waiting.spread_seconds)

    def _interrupt_if_past(self, message: control_pb2.ConnectResponse) -> None:
        """The run went on: training for a round that is closed is of no use."""
        run, invitation = self._run, message.invitation
        if invitation.run_id:
            self._newest = (invitation.run_id, invitation.round)
        elif message.finished.run_id:
            self._newest = (message.finished.run_id, _NO_ROUND)
        if (invitation.run_id, invitation.round) == self._closed:
            self._closed = None  # this device is wanted in the round after all
        repeated = run is not None and (invitation.run_id, invitation.round) == (
            run.run_id,
            run.round,
        )
        if run is not None and not repeated:
            run.overtaken(message)

    async def _work(self, steps: _Steps, follow: _Follow) -> None:
        """Do the steps one after another; a refused step is reported and the next one done."""
        while True:
            message = await steps.get()
            try:
                await follow(message)
            except Interrupted:
                _log.info("step interrupted: the run went on")
                cause = wait_cause(control_pb2.WAIT_CAUSE_ROUND_CLOSED)
                self._status.step(Step.WAITING, *_subject_of(message), cause)
            except Refused as refused:
                _raise_if_hopeless(refused)
                _log.warning("step declined", refusal=str(refused))
                self._decline(message, refused)
            except (OSError, MemoryError) as error:
                _log.exception("step failed")
                self._decline(message, Refused(Reason.INTERNAL, type(error).__name__))

    async def _share_key(self, message: control_pb2.ConnectResponse) -> None:
        read_run_id(message.wrap_key.run_id)
        answer = await asyncio.to_thread(share_run_key, self._device.identity, message.wrap_key)
        self._send(control_pb2.ConnectRequest(wrapped_key=answer))

    async def _in_turn(self, transfer: Transfer, message: control_pb2.ConnectResponse) -> None:
        async with self._at_work:
            await self._step(transfer, message)

    async def _step(self, transfer: Transfer, message: control_pb2.ConnectResponse) -> None:
        match message.WhichOneof("step"):
            case "invitation":
                await self._invited(transfer, message.invitation)
            case "cohort":
                await self._run_of(message.cohort.run_id, transfer).cohort(message.cohort)
            case "mask_step":
                await self._run_of(message.mask_step.run_id, transfer).mask_step(message.mask_step)
            case "accepted":
                self._run_of(message.accepted.run_id, transfer).accepted(message.accepted)
            case "result":
                await self._run_of(message.result.run_id, transfer).result(message.result)
            case "return_sum":
                run = self._run_of(message.return_sum.run_id, transfer)
                await run.return_sum(message.return_sum)
            case "finished":
                await self._run_of(message.finished.run_id, transfer).finished(message.finished)
                self.finished.put_nowait(message.finished)
            case "welcome" | "refusal" | "waiting" | "wrap_key" | None:
                raise AssertionError("handled as it is read")

    async def _invited(self, transfer: Transfer, invitation: control_pb2.Invitation) -> None:
        if (invitation.run_id, invitation.round) == self._closed:
            raise Interrupted
        run_id, newest = self._newest
        if (
            is_asynchronous(invitation)
            and invitation.run_id == run_id
            and invitation.round < newest
        ):
            return  # the newest one has all that this one says
        await self._run_of(invitation.run_id, transfer).invited(invitation)

    def _run_of(self, run_id: bytes, transfer: Transfer) -> Participation:
        """Return this device's part in the run; it takes part in one run at a time."""
        if self._run is None or self._run.run_id != run_id:
            self._run = Participation(
                self._device, transfer, self._send, self._status, read_run_id(run_id)
            )
        return self._run

    def _decline(self, message: control_pb2.ConnectResponse, refused: Refused) -> None:
        run_id, round_number = _subject_of(message)
        self._status.step(Step.DECLINED, run_id, round_number, str(refused))
        refusal = control_pb2.StepRefusal(
            run_id=run_id, round=round_number, details=refusal_details(refused)
        )
        self._send(control_pb2.ConnectRequest(refusal=refusal))


def _subject_of(message: control_pb2.ConnectResponse) -> tuple[bytes, int]:
    """Return the run and round that a step belongs to."""
    match message.WhichOneof("step"):
        case "wrap_key":
            return message.wrap_key.run_id, 0
        case "invitation":
            return message.invitation.run_id, message.invitation.round
        case "cohort":
            return message.cohort.run_id, message.cohort.round
        case "mask_step":
            return message.mask_step.run_id, message.mask_step.round
        case "accepted":
            return message.accepted.run_id, message.accepted.round
        case "result":
            return message.result.run_id, message.result.outcome.round
        case "return_sum":
            return message.return_sum.run_id, message.return_sum.round
        case "finished":
            return message.finished.run_id, 0
        case _:
            return b"", 0


def _raise_if_hopeless(cause: FedloomError) -> None:
    stop = isinstance(cause, Refused) and RULES[cause.reason].reaction.ends_session
    if stop or (isinstance(cause, Unreachable) and cause.hopeless):
        raise cause
