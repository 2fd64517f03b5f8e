"""Run keys on the device: made here, wrapped for other agents, opened from what they wrapped."""

import structlog

from crypto import CryptoError, RunKey, WrapContext, generate_run_key, unwrap, wrap
from edge_agent.identity import Identity
from fedloom.errors import Reason, Refused
from fedloom.v1 import control_pb2

_log = structlog.get_logger()


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
