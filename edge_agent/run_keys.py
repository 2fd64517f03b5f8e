"""Run keys on the device: made here, wrapped for other agents, opened from what they wrapped.

A run has one key at a time, numbered from 1; a new one comes when the set of its holders changes
and when one is spent. The device remembers, by number, the newest that it was given and how many
sums each has refused: nothing is encoded under an older key again, which a removed agent may hold.
"""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import structlog

from crypto import CryptoError, RunKey, WrapContext, generate_run_key, unwrap, wrap
from edge_agent.identity import Identity
from fedloom.errors import Reason, Refused
from fedloom.secret_files import write_secret
from fedloom.v1 import control_pb2

MAX_REFUSED_SUMS = 8  # a refused sum tells its maker up to one bit of the key
_FILE = "run-keys.json"  # numbers, no keys
_log = structlog.get_logger()


class RunKeys:
    """The keys of one run that this device was given with its last invitation."""

    def __init__(self, folder: Path, identity: Identity, run_id: bytes) -> None:
        self._path = folder / _FILE
        self._identity = identity
        self._run_id = run_id
        self._keys: dict[int, RunKey] = {}
        kept = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._newest_given: int = kept.get("newest_given", 0)
        self._refused_sums: dict[int, int] = {
            int(key_id): count for key_id, count in kept.get("refused_sums", {}).items()
        }

    async def take(self, envelopes: Sequence[control_pb2.KeyEnvelope]) -> None:
        """Open the envelopes of a message, which replace those before; raises Refused."""
        numbers = [envelope.key_id for envelope in envelopes]
        if not numbers:
            raise Refused(Reason.KEY_UNAVAILABLE, "expected the run key with the invitation")
        if numbers != sorted(set(numbers)) or numbers[0] < 1:
            raise Refused(
                Reason.MALFORMED, f"expected run keys in ascending order from 1, found {numbers}"
            )
        self._keys = await asyncio.to_thread(self._opened, envelopes)
        if numbers[-1] > self._newest_given:
            self._newest_given = numbers[-1]
            self._keep()

    def _opened(self, envelopes: Sequence[control_pb2.KeyEnvelope]) -> dict[int, RunKey]:
        return {
            envelope.key_id: open_envelope(self._identity, self._run_id, envelope)
            for envelope in envelopes
        }

    def to_encode(self) -> RunKey:
        """Return the key of the round in hand.

        Raises Refused: KEY_UNAVAILABLE for one that is older than a key that this device was given
        before, KEY_SPENT for one that has refused too many sums.
        """
        newest = max(self._keys, default=0)
        if newest < self._newest_given:
            raise Refused(
                Reason.KEY_UNAVAILABLE,
                f"expected run key {self._newest_given} or a newer one, found {newest}: agents "
                "that were removed may hold it",
            )
        self._require_refused_below(MAX_REFUSED_SUMS, newest)
        return self.to_open(newest)

    def to_open(self, key_id: int) -> RunKey:
        """Return the key of a finished round; raises Refused(KEY_UNAVAILABLE, KEY_SPENT).

        Each refused sum tells its maker up to one bit about the key (crypto/README.md). After
        MAX_REFUSED_SUMS nothing is encoded under it any more; what others finished under it can
        still be caught up with, until as many again were refused.
        """
        self._require_refused_below(2 * MAX_REFUSED_SUMS, key_id)
        if key_id not in self._keys:
            raise Refused(
                Reason.KEY_UNAVAILABLE, f"expected run key {key_id}, found {sorted(self._keys)}"
            )
        return self._keys[key_id]

    def _require_refused_below(self, limit: int, key_id: int) -> None:
        refused = self._refused_sums.get(key_id, 0)
        if refused >= limit:
            raise Refused(
                Reason.KEY_SPENT,
                f"expected a run key that has refused fewer than {limit} sums, "
                f"found key {key_id}, which has refused {refused}",
            )

    def count_refused_sum(self, key_id: int) -> None:
        """Remember, before anyone is told, that this key refused a sum once more."""
        self._refused_sums[key_id] = self._refused_sums.get(key_id, 0) + 1
        self._keep()

    def _keep(self) -> None:
        kept = {"newest_given": self._newest_given, "refused_sums": self._refused_sums}
        write_secret(self._path, json.dumps(kept).encode())


def share_run_key(identity: Identity, request: control_pb2.WrapKey) -> control_pb2.WrappedKey:
    """Wrap the run key for every recipient whose key verifies; without an envelope, make it.

    A recipient whose key does not verify gets nothing: the coordinator cannot slip in one of its
    own. Raises Refused(KEY_UNAVAILABLE) when the envelope in the request cannot be opened, and
    MALFORMED when it holds a key of another number: a key that is spent, or that a removed agent
    holds, must not come back under a new one.
    """
    if request.key_id < 1:
        raise Refused(Reason.MALFORMED, "expected the number of a run key, from 1")
    if request.HasField("envelope"):
        if request.envelope.key_id != request.key_id:
            raise Refused(
                Reason.MALFORMED,
                f"expected run key {request.key_id} in the envelope, "
                f"found {request.envelope.key_id}",
            )
        run_key = open_envelope(identity, request.run_id, request.envelope)
    else:
        run_key = generate_run_key()
    answer = control_pb2.WrappedKey(run_id=request.run_id, key_id=request.key_id)
    for recipient in request.recipients:
        context = WrapContext(request.run_id, request.key_id, identity.agent_id, recipient.agent_id)
        try:
            public = identity.verified_exchange_key(recipient.agent_id, recipient.exchange_key)
            wrapped = wrap(run_key, identity.exchange_key, public, context)
        except (Refused, CryptoError) as error:
            _log.warning("run key withheld", recipient=recipient.agent_id, problem=str(error))
            continue
        answer.envelopes.add(
            sender_id=identity.agent_id,
            sender_key=identity.advertised_exchange_key(),
            recipient_id=recipient.agent_id,
            wrapped=wrapped,
            key_id=request.key_id,
        )
    return answer


def open_envelope(identity: Identity, run_id: bytes, envelope: control_pb2.KeyEnvelope) -> RunKey:
    """Return the run key that another agent wrapped for this one; raises Refused."""
    public = identity.verified_exchange_key(envelope.sender_id, envelope.sender_key)
    try:
        context = WrapContext(run_id, envelope.key_id, envelope.sender_id, identity.agent_id)
        return unwrap(envelope.wrapped, identity.exchange_key, public, context)
    except CryptoError as error:
        raise Refused(Reason.KEY_UNAVAILABLE, str(error)) from error
