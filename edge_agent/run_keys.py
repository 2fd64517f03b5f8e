"""Run keys on the device: made here, wrapped for other agents, opened from what they wrapped."""

from pathlib import Path

import structlog

from crypto import CryptoError, RunKey, WrapContext, generate_run_key, unwrap, wrap
from crypto.cohort import MAX_REFUSED_SUMS
from edge_agent.identity import Identity
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2

_log = structlog.get_logger()


_REFUSED_SUMS_FILE = "refused-sums"


def count_refused_sum(folder: Path) -> None:
    """Remember, in the run's folder, that its key refused a sum once more."""
    count = _refused_sums(folder) + 1
    (folder / _REFUSED_SUMS_FILE).write_text(f"{count}\n")


def require_fresh_key(folder: Path) -> None:
    """Raise Refused(KEY_UNAVAILABLE) when the run's key has refused too many sums.

    Each refusal tells the maker of the sum up to one bit about the key (crypto/README.md): after
    MAX_REFUSED_SUMS this device takes no further part in the run.
    """
    if _refused_sums(folder) >= MAX_REFUSED_SUMS:
        raise Refused(
            Reason.KEY_UNAVAILABLE,
            f"expected a run whose key has refused fewer than {MAX_REFUSED_SUMS} sums",
        )


def _refused_sums(folder: Path) -> int:
    path = folder / _REFUSED_SUMS_FILE
    return int(path.read_text()) if path.exists() else 0


def share_run_key(identity: Identity, request: control_pb2.WrapKey) -> control_pb2.WrappedKey:
    """Wrap the run key for every recipient whose key verifies; without an envelope, make it.

    A recipient whose key does not verify gets nothing: the coordinator cannot slip in one of its
    own. Raises Refused(KEY_UNAVAILABLE) when the envelope in the request cannot be opened.
    """
    if request.HasField("envelope"):
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
