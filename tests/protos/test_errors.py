"""A refusal arrives as it was sent, whatever its reason and however long its subject."""

import grpc
import pytest
from google.rpc.status_pb2 import Status
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import (
    MAX_RETRY_SECONDS,
    MAX_SUBJECT_BYTES,
    RULES,
    Reaction,
    Reason,
    Refused,
    refusal_details,
    refusal_trailers,
    refused_from_details,
    refused_from_rpc,
)
from fedloom.v1 import enrolment_pb2, enrolment_pb2_grpc, refusal_pb2

KEY = "grpc-status-details-bin"
_any_text = st.text(st.characters())  # lone surrogates too: file names hold them


def rpc_error(*trailers: tuple[str, str | bytes]) -> grpc.aio.AioRpcError:
    """The error that grpc.aio raises for an RPC that ended with these trailers."""
    return grpc.aio.AioRpcError(
        grpc.StatusCode.UNKNOWN, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers)
    )


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_survives_the_trailers(reason: Reason) -> None:
    trailers = refusal_trailers(Refused(reason, "expected 1, found 2"))
    status = Status.FromString(trailers[0][1])
    assert status.code == RULES[reason].code.value[0]
    assert status.message == f"{reason.name}: expected 1, found 2"
    found = refused_from_rpc(rpc_error(*trailers))
    assert found is not None
    assert (found.reason, found.subject) == (reason, "expected 1, found 2")


@given(st.sampled_from(Reason), _any_text.map(lambda text: text * 40))
def test_a_subject_is_cut_at_a_character_and_fits_the_wire(reason: Reason, subject: str) -> None:
    details = refusal_details(Refused(reason, subject))
    sent = details.subject.encode()
    whole = subject.encode(errors="replace")
    assert len(sent) <= MAX_SUBJECT_BYTES
    assert whole.startswith(sent)
    assert len(sent) == len(whole) or len(sent) > MAX_SUBJECT_BYTES - 4
    assert refused_from_details(details).subject == details.subject
    trailers = refusal_trailers(Refused(reason, subject))
    assert sum(len(value) for _, value in trailers) < 4096  # half of gRPC's limit for metadata


@given(st.sampled_from(Reason), st.none() | st.floats(0, MAX_RETRY_SECONDS))
def test_how_long_to_wait_travels_too(reason: Reason, seconds: float | None) -> None:
    details = refusal_details(Refused(reason, "", seconds))
    assert details.HasField("retry_after") == (seconds is not None)
    assert refused_from_details(details).retry_after == pytest.approx(seconds, abs=1e-6)


@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(-(1 << 31), (1 << 31) - 1))
def test_no_peer_silences_another_for_longer_than_an_hour(seconds: int, nanos: int) -> None:
    details = refusal_pb2.RefusalDetails(reason=refusal_pb2.REASON_BUSY)
    details.retry_after.seconds, details.retry_after.nanos = seconds, nanos
    wait = refused_from_details(details).retry_after
    assert wait is not None
    assert 0 <= wait <= MAX_RETRY_SECONDS


def test_an_unknown_reason_counts_as_internal_and_none_as_malformed() -> None:
    newer = refusal_pb2.RefusalDetails(subject="from the future")
    newer.ParseFromString(b"\x08\xe7\x07" + newer.SerializeToString())  # reason = 999
    found = refused_from_details(newer)
    assert (found.reason, found.subject) == (Reason.INTERNAL, "from the future")
    assert RULES[found.reason].reaction is Reaction.RECONNECT
    assert refused_from_details(refusal_pb2.RefusalDetails()).reason is Reason.MALFORMED


def _status(*details: bytes) -> bytes:
    status = Status(code=3)
    for value in details:
        entry = status.details.add()
        entry.type_url = "type.googleapis.com/fedloom.v1.RefusalDetails"
        entry.value = value
    return bytes(status.SerializeToString())


@pytest.mark.parametrize(
    "trailers",
    [
        (),
        (("other-bin", _status(b"\x08\x01")),),
        ((KEY, b"\xff\xff\xff"),),
        ((KEY, _status(b"\xff\xff\xff")),),
        ((KEY, _status()),),
        ((KEY, _status(b"\x08\x01", b"\x08\x02")),),
        ((KEY, Status(code=3, message="no details").SerializeToString()),),
    ],
    ids=["none", "other key", "garbage", "garbage inside", "no details", "two details", "bare"],
)
def test_trailers_that_hold_no_refusal_are_none(trailers: tuple[tuple[str, bytes], ...]) -> None:
    assert refused_from_rpc(rpc_error(*trailers)) is None


class _Refusing(enrolment_pb2_grpc.EnrolmentServiceServicer):
    def __init__(self, refused: Refused) -> None:
        self._refused = refused

    async def Enrol(  # noqa: N802 - the generated name
        self,
        request: enrolment_pb2.EnrolRequest,
        context: grpc.aio.ServicerContext[enrolment_pb2.EnrolRequest, enrolment_pb2.EnrolResponse],
    ) -> enrolment_pb2.EnrolResponse:
        code = RULES[self._refused.reason].code
        await context.abort(code, "refused", refusal_trailers(self._refused))
        raise AssertionError("abort always raises")


@pytest.mark.integration
@pytest.mark.parametrize(
    "refused",
    [
        Refused(Reason.TOKEN_EXPIRED, "expected a token valid today, found one of 2026-01-01"),
        Refused(Reason.MALFORMED, "é" * 100_000),
    ],
    ids=["short", "very long"],
)
async def test_a_refusal_crosses_a_real_connection(refused: Refused) -> None:
    server = grpc.aio.server()
    enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(_Refusing(refused), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Enrol(enrolment_pb2.EnrolRequest(), timeout=10)
    finally:
        await server.stop(None)
    found = refused_from_rpc(caught.value)
    assert caught.value.code() is RULES[refused.reason].code
    assert found is not None
    assert found.reason is refused.reason
    assert refused.subject.startswith(found.subject)
    assert found.subject
