"""Hundreds of light agents in one process: the control protocol in full, no training, no opening.

    python -m benchmarks.virtual_agents IDENTITIES ADDRESS [--report FILE]

Each has its own certificate, its own TLS connection and its own stream. What it uploads is a valid
update of zeros, made once; under masks its boxes and shares are random bytes, which a relay cannot
tell from real ones, so that the machine's time goes to the coordinator.
"""

import argparse
import asyncio
import hashlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import crypto
from crypto import cohort
from crypto.cohort.secrets import AttemptSecret, commitment, public_key
from crypto.cohort.shamir import SHARE_SIZE
from crypto.masks import Mask
from crypto.wire import HEADER_SIZE, PLANE_BYTES
from edge_agent.identity import Identity
from edge_agent.run_keys import share_run_key
from fedloom.channels import CLIENT_OPTIONS
from fedloom.terms import Protection
from fedloom.v1 import artifact_pb2, artifact_pb2_grpc, control_pb2, control_pb2_grpc
from fedloom.version import PROTOCOL_VERSION

_BOX_SIZE = 2 * SHARE_SIZE + 16
_PART_BYTES = 1 << 18
_CONNECTING = 64  # handshakes at a time
_NICENESS = 10  # real agents take no time from the coordinator's cores
_SEED_SIZE = 64
_DIGEST = bytes(32)


@dataclass
class Report:
    """What the agents of this process saw."""

    connected: int = 0
    finished: int = 0
    refused: int = 0
    sent_bytes: int = 0


class VirtualAgent:
    """One agent: its connection, and its answers."""

    def __init__(self, identity: Identity, channel: grpc.aio.Channel, report: Report) -> None:
        self._identity = identity
        self._channel = channel
        self._report = report
        self._outbox: asyncio.Queue[control_pb2.ConnectRequest] = asyncio.Queue()
        self._secret: AttemptSecret | None = None
        self._terms = control_pb2.Invitation()
        self._cohort = control_pb2.Cohort()

    async def live(self, gate: asyncio.Semaphore) -> None:
        """Connect and answer until the run is over, or for ever."""
        async with gate:
            call = control_pb2_grpc.ControlServiceStub(self._channel).Connect(self._requests())
            await call.read()
            self._report.connected += 1
        while (message := await call.read()) is not grpc.aio.EOF:
            await self._step(message)

    async def _requests(self) -> AsyncIterator[control_pb2.ConnectRequest]:
        hello = control_pb2.Hello(protocol_version=PROTOCOL_VERSION, software="virtual")
        hello.protections.extend(control_pb2.Protection.ValueType(p) for p in Protection)
        hello.exchange_key.CopyFrom(self._identity.advertised_exchange_key())
        yield control_pb2.ConnectRequest(hello=hello)
        while True:
            yield await self._outbox.get()

    async def _step(self, message: control_pb2.ConnectResponse) -> None:
        match message.WhichOneof("step"):
            case "wrap_key":
                answer = share_run_key(self._identity, message.wrap_key)
                self._say(control_pb2.ConnectRequest(wrapped_key=answer))
            case "invitation":
                self._ready(message.invitation)
            case "cohort":
                self._cohort = message.cohort
                if message.cohort.mask_cohort:
                    self._say_step(self._boxes())
                else:
                    await self._upload()
            case "mask_step":
                await self._mask_step(cohort.decode(message.mask_step.message))
            case "result":
                await self._apply(message.result)
            case "refusal":
                self._report.refused += 1
            case "finished":
                self._report.finished += 1
            case _:
                pass

    def _ready(self, invitation: control_pb2.Invitation) -> None:
        self._terms = invitation
        ready = control_pb2.Ready(
            run_id=invitation.run_id, round=invitation.round, weight_class=4, training_loss=1.0
        )
        if Protection(invitation.encoding.protection).has_masks:
            attempt = cohort.AttemptId(invitation.run_id, invitation.round, invitation.attempt)
            self._secret = AttemptSecret(os.urandom(32), attempt)
            unsigned = cohort.Advertisement(
                attempt,
                self._identity.agent_id,
                public_key(self._secret.mask_key),
                public_key(self._secret.share_key),
                commitment(self._secret.seed),
                bytes(64),
            )
            signature = self._identity.identity_key.sign(unsigned.statement())
            ready.advertisement = unsigned.encode()[:-64] + signature
            ready.identity.CopyFrom(self._identity.advertised_identity_key())
        self._say(control_pb2.ConnectRequest(ready=ready))

    def _boxes(self) -> bytes:
        others = len(self._cohort.members) - 1
        random = os.urandom(_BOX_SIZE * others)
        cut = tuple(random[i : i + _BOX_SIZE] for i in range(0, len(random), _BOX_SIZE))
        return cohort.Boxes(self._attempt, self._slot, cut).encode()

    async def _mask_step(self, message: cohort.Message) -> None:
        match message:
            case cohort.Boxes():
                await self._upload()
            case cohort.Acceptance():
                signature = self._identity.identity_key.sign(message.statement())
                self._say_step(cohort.Endorsement(self._attempt, self._slot, signature).encode())
            case cohort.Certificate():
                others = len(self._cohort.members) - 1
                shares = tuple(os.urandom(SHARE_SIZE - 1) + b"\0" for _ in range(others))
                seed = b"" if self._secret is None else self._secret.seed
                release = cohort.Release(self._attempt, self._slot, seed, shares)
                self._say_step(release.encode())
            case _:
                pass

    @property
    def _attempt(self) -> cohort.AttemptId:
        return cohort.AttemptId(self._cohort.run_id, self._cohort.round, self._cohort.attempt)

    @property
    def _slot(self) -> int:
        return list(self._cohort.members).index(self._identity.agent_id)

    async def _upload(self) -> None:
        encoded = encoded_update(self._terms, self._cohort, self._slot)
        header = artifact_pb2.UploadHeader(
            run_id=self._cohort.run_id,
            round=self._cohort.round,
            attempt=self._cohort.attempt,
            size_bytes=len(encoded),
            sha256=hashlib.sha256(encoded).digest(),
        )
        # As agents do: no part before the coordinator asks, else it holds a window of each.
        call = artifact_pb2_grpc.ArtifactServiceStub(self._channel).UploadArtifact()
        await call.write(artifact_pb2.UploadArtifactRequest(header=header))
        await call.read()
        for start in range(0, len(encoded), _PART_BYTES):
            part = encoded[start : start + _PART_BYTES]
            await call.write(artifact_pb2.UploadArtifactRequest(part=part))
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
        self._report.sent_bytes += len(encoded)

    async def _apply(self, result: control_pb2.Result) -> None:
        stub = artifact_pb2_grpc.ArtifactServiceStub(self._channel)
        request = artifact_pb2.DownloadArtifactRequest(sha256=result.outcome.sum.sha256)
        async for _ in stub.DownloadArtifact(request):
            pass
        applied = control_pb2.Applied(
            run_id=result.run_id, round=result.outcome.round, state_sha256=_DIGEST
        )
        self._say(control_pb2.ConnectRequest(applied=applied))

    def _say(self, message: control_pb2.ConnectRequest) -> None:
        self._outbox.put_nowait(message)

    def _say_step(self, message: bytes) -> None:
        step = control_pb2.MaskStep(
            run_id=self._cohort.run_id, round=self._cohort.round, message=message
        )
        self._say(control_pb2.ConnectRequest(mask_step=step))


_templates: dict[tuple[bytes, int, int], bytes] = {}


def encoded_update(
    terms: control_pb2.Invitation, formed: control_pb2.Cohort, slot: int
) -> bytearray | bytes:
    """Return an update of zeros for the slot: made once for each cohort, its headers patched."""
    protection = Protection(terms.encoding.protection)
    digest = cohort.decode(formed.mask_cohort).digest if formed.mask_cohort else b""
    context = crypto.UpdateContext(
        run_id=formed.run_id,
        round=formed.round,
        attempt=formed.attempt,
        parameter_count=PARAMETERS,
        capacity=terms.encoding.capacity,
        weight_cap=formed.weight_cap,
        clip=formed.clip,
        update_bits=terms.encoding.update_bits,
        cohort=digest,
    )
    key = (formed.run_id, formed.round, formed.attempt)
    if key not in _templates:
        _templates.clear()
        module = crypto.protection(protection.name.lower())
        run_key = crypto.RunKey(bytes(32)) if protection.has_run_key else None
        masks = (Mask(bytes(32)),) if protection.has_masks else None
        encoder = module.encoder(context, 0, run_key, np.random.default_rng(0), masks)
        values = np.zeros(PARAMETERS, np.float32)
        _templates[key] = b"".join(encoder.encode(values, 1))
    patched = bytearray(_templates[key])
    for offset in _header_offsets(context, protection):
        patched[offset + 6 : offset + 8] = slot.to_bytes(2, "little")
    return bytes(patched)


def _header_offsets(context: crypto.UpdateContext, protection: Protection) -> list[int]:
    if protection is Protection.PLAIN:
        return [0]
    parameters = crypto.BfvParameters.derive(context, protection.name.lower())
    per_ciphertext = PLANE_BYTES * 4096 + (_SEED_SIZE if protection.needs_tenseal else 0)
    offsets, offset = [], 0
    for chunk in parameters.update_order:
        offsets.append(offset)
        offset += HEADER_SIZE + parameters.chunk_ciphertexts(chunk) * per_ciphertext
    return offsets


PARAMETERS = 100_000


def load_identities(path: Path, address: str) -> list[Identity]:
    """Read what `benchmarks.fleet` enrolled."""
    lines = path.read_text().splitlines()
    authority = x509.load_pem_x509_certificate(json.loads(lines[0])["authority"].encode())
    identities = []
    for line in lines[1:]:
        fields = json.loads(line)
        identities.append(
            Identity(
                fields["name"],
                address,
                load_pem_private_key(fields["key"].encode(), None),
                x509.load_pem_x509_certificate(fields["certificate"].encode()),
                authority,
                X25519PrivateKey.generate(),
                Ed25519PrivateKey.generate(),
            )
        )
    return identities


async def main() -> None:
    """Run the agents until they are told to end; the report is rewritten each second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("identities", type=Path)
    parser.add_argument("address")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    os.nice(_NICENESS)
    report, gate = Report(), asyncio.Semaphore(_CONNECTING)
    own = [*CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]  # a connection for each
    lives = []
    for identity in load_identities(options.identities, options.address):
        channel = grpc.aio.secure_channel(
            options.address, identity.channel_credentials(), options=own
        )
        lives.append(asyncio.create_task(VirtualAgent(identity, channel, report).live(gate)))
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    while not ending.is_set():
        for life in lives:
            if life.done():
                life.result()
        options.report.write_text(json.dumps({**report.__dict__, "at": time.time()}))
        await asyncio.sleep(0.25)


if __name__ == "__main__":
    asyncio.run(main())
