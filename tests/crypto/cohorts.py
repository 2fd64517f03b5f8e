"""Members, signatures that need no curve, and an honest relay that runs an attempt to its end."""

import hashlib
from collections import deque

import numpy as np

from crypto import Correction, Mask
from crypto.cohort import (
    Acceptance,
    AttemptId,
    Boxes,
    Certificate,
    Cohort,
    Endorsement,
    Join,
    MemberPolicy,
    MemberState,
    MemberTools,
    Release,
    Send,
    Uploaded,
    UploadReady,
    check_advertisement,
    handle_member,
    handle_relay,
    masks,
    new_attempt,
    new_member,
    repeat,
)
from crypto.masks import masked

RUN = bytes(range(16))
BITS = 47
TO_MEMBER = (Cohort, Boxes, Acceptance, Certificate)
TO_RELAY = (Boxes, Endorsement, Release)


def sign_as(agent_id):
    """Sign as a stand-in for Ed25519: unforgeable for who does not call this."""

    def sign(statement):
        return hashlib.sha512(agent_id.encode() + b"\0" + statement).digest()

    return sign


def verify(agent_id, statement, signature):
    return agent_id != "stranger" and sign_as(agent_id)(statement) == signature


def tools(agent_id, minimum=3):
    return MemberTools(sign_as(agent_id), verify, MemberPolicy(minimum))


def attempt_of(round_number=1, attempt=1, run_id=RUN):
    return AttemptId(run_id, round_number, attempt)


def secret_of(agent_id, attempt, salt=""):
    text = f"{agent_id}/{attempt.round}/{attempt.attempt}/{salt}"
    return hashlib.sha256(text.encode()).digest()


class Device:
    """A member with an update of three coefficients, whose state lives through restarts."""

    def __init__(self, agent_id, minimum=3):
        self.agent_id = agent_id
        self.tools = tools(agent_id, minimum)
        self.state = new_member(agent_id, RUN)
        self.update = np.frombuffer(hashlib.sha256(agent_id.encode()).digest()[:12], "<u4")
        self.upload = None  # (3,) u64

    def take(self, event):
        self.state, answer = handle_member(self.state, event, self.tools)
        return answer

    def join(self, attempt):
        return self.take(Join(attempt, secret_of(self.agent_id, attempt)))

    def restart(self):
        self.state = MemberState.decode(self.state.encode())

    def encode(self):
        """Mask the update and fix its hash; return the hash."""
        words = self.update.astype(np.uint64)
        chunks = iter([(0, words)])
        (_, self.upload) = next(masked(chunks, masks(self.state), BITS))
        sha256 = hashlib.sha256(self.upload.tobytes()).digest()
        self.take(UploadReady(self.state.attempt, sha256))
        return sha256


def opened(uploads, correction: Correction):
    """Add uploads and take out the correction, modulo 2^T."""
    total = sum(uploads, np.zeros(3, np.uint64)) + correction.words(0, 3, BITS)
    return total & np.uint64((1 << BITS) - 1)


def plain_sum(devices):
    return sum((device.update.astype(np.uint64) for device in devices), np.zeros(3, np.uint64))


class Federation:
    """Honest devices and an honest relay; effects go through a queue of (agent id, message)."""

    def __init__(self, count, minimum=3, attempt=None):
        self.devices = {f"agent-{i:04}": Device(f"agent-{i:04}", minimum) for i in range(count)}
        self.open(attempt or attempt_of(), minimum)

    def open(self, attempt, minimum=3):
        self.attempt, self.minimum = attempt, minimum
        self.relay = None
        self.journal = []
        self.queue = deque()
        self.correction = None
        self.survivors = None
        self.gone = set()

    def join(self, *names):
        """Have these devices, or all, advertise; tell them their cohort."""
        advertised = [self.devices[name].join(self.attempt) for name in names or self.devices]
        for advertisement in advertised:
            check_advertisement(advertisement, verify)
        self.relay = new_attempt(self.attempt, self.minimum, advertised)
        for member in self.relay.cohort.members:
            self.queue.extend(repeat(self.relay, member.agent_id))

    def replayed(self):
        """Return the relay of a coordinator that was started again: what changed it, once more."""
        cohort = self.relay.cohort
        relay = new_attempt(cohort.attempt, cohort.minimum, cohort.members)
        for event in self.journal:
            relay, _ = handle_relay(relay, event, verify)
        return relay

    def tell(self, event):
        before = self.relay
        self.relay, effects = handle_relay(before, event, verify)
        if self.relay is not before:
            self.journal.append(event)
        for effect in effects:
            if isinstance(effect, Send):
                self.queue.append(effect)
            elif hasattr(effect, "survivors"):
                self.survivors = effect.survivors
            else:
                self.correction = effect.correction

    def run(self):
        while self.queue:
            effect = self.queue.popleft()
            if effect.agent_id not in self.gone:
                self.deliver(self.devices[effect.agent_id], effect.message)

    def deliver(self, device, message):
        answer = device.take(message)
        if answer is not None:
            self.tell(answer)
        if isinstance(message, Boxes):
            self.upload(device)

    def upload(self, device):
        self.tell(Uploaded(self.relay.attempt, device.state.slot, device.encode()))

    def accepted(self):
        names = [m.agent_id for m in self.relay.cohort.members]
        return [self.devices[names[slot]] for slot in self.relay.acceptance.slots]

    def check_sum(self):
        devices = self.accepted()
        total = opened([d.upload for d in devices], self.correction)
        np.testing.assert_array_equal(total, plain_sum(devices))


def fresh_mask(number: int) -> Mask:
    return Mask(hashlib.sha256(b"%d" % number).digest())
