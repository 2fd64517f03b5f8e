"""Every parser of `crypto` behind one function of bytes: a case ends in a value or a refusal.

The first byte chooses the parser. Bytes that are long enough are also laid over a valid input, so
that not every case dies in the header.
"""

import io
from collections.abc import Callable

import numpy as np

from crypto import (
    CryptoError,
    Mask,
    RunKey,
    UpdateContext,
    WrapContext,
    masked,
    plain,
    unwrap,
)
from crypto.cohort import MemberState, decode, new_member
from crypto.cohort.shamir import recover

RUN = bytes(16)
KEY = RunKey(bytes(32))
CONTEXT = UpdateContext(RUN, 1, 1, 5, 4, 10, 1.0)
COHORT = UpdateContext(RUN, 1, 1, 5, 4, 10, 1.0, cohort=bytes(32))


def _valid_masked() -> bytes:
    encoder = masked.encoder(COHORT, 0, KEY, np.random.default_rng(0), [Mask(bytes(32))])
    return b"".join(encoder.encode(np.zeros(5, np.float32), 1))


def _valid_plain() -> bytes:
    return b"".join(
        plain.encoder(CONTEXT, 0, None, np.random.default_rng(0)).encode(np.zeros(5, np.float32), 1)
    )


def _valid_form(context: UpdateContext) -> bytes:
    update = np.zeros(context.parameter_count, np.float32)
    return b"".join(plain.encoder(context, 0, None, np.random.default_rng(0)).encode(update, 1))


LISTED = UpdateContext(RUN, 1, 1, 9, 4, 10, 1.0, tail_length=2, listed=3)
QUANTISED = UpdateContext(RUN, 1, 1, 9, 4, 10, 1.0, tail_length=2, quantised=True)
MASKED_UPDATE, PLAIN_UPDATE = _valid_masked(), _valid_plain()
LISTED_UPDATE, QUANTISED_UPDATE = _valid_form(LISTED), _valid_form(QUANTISED)
MEMBER = new_member("a", RUN).encode()


def overlaid(valid: bytes, data: bytes) -> bytes:
    """Write data at an offset that its first two bytes choose; the next one may cut the end."""
    if len(data) < 4:
        return data
    offset = int.from_bytes(data[:2], "little") % (len(valid) + 1)
    cut = len(valid) - (data[2] if data[2] < 4 else 0)
    return (valid[:offset] + data[3:] + valid[offset + len(data) - 3 :])[:cut]


def add_masked(data: bytes) -> None:
    masked.accumulator(COHORT).add(0, io.BytesIO(overlaid(MASKED_UPDATE, data)))


def open_masked(data: bytes) -> None:
    sum_of_one = bytearray(overlaid(MASKED_UPDATE, data))
    masked.open_sum(COHORT, KEY, (0,), io.BytesIO(sum_of_one))


def read_masked(data: bytes) -> None:
    masked.read_sum(COHORT, (0,), io.BytesIO(overlaid(MASKED_UPDATE, data)))


def add_plain(data: bytes) -> None:
    plain.accumulator(CONTEXT).add(0, io.BytesIO(overlaid(PLAIN_UPDATE, data)))


def add_listed(data: bytes) -> None:
    plain.accumulator(LISTED).add(0, io.BytesIO(overlaid(LISTED_UPDATE, data)))


def add_quantised(data: bytes) -> None:
    plain.accumulator(QUANTISED).add(0, io.BytesIO(overlaid(QUANTISED_UPDATE, data)))


def open_plain(data: bytes) -> None:
    plain.open_sum(CONTEXT, None, (0,), io.BytesIO(overlaid(PLAIN_UPDATE, data)))


def read_message(data: bytes) -> None:
    message = decode(b"FDLC\1" + data)
    assert message.encode() == b"FDLC\1" + data  # one encoding for each message


def read_member(data: bytes) -> None:
    MemberState.decode(overlaid(MEMBER, data))


def unwrap_key(data: bytes) -> None:
    from crypto import generate_exchange_key

    ours = generate_exchange_key()
    unwrap(b"FDLK" + data, ours, data[:32].ljust(32, b"\1"), WrapContext(RUN, 1, "a", "b"))


def recover_shares(data: bytes) -> None:
    recover({i: data[i * 33 : i * 33 + 33] for i in range(3)}, 3)


PARSERS: tuple[Callable[[bytes], None], ...] = (
    add_masked,
    open_masked,
    read_masked,
    add_plain,
    open_plain,
    read_message,
    read_message,
    read_message,
    read_member,
    unwrap_key,
    recover_shares,
    add_listed,
    add_quantised,
)


def sealed_parsers() -> tuple[Callable[[bytes], None], ...]:
    """Return the parsers before SEAL, which need TenSEAL to be installed."""
    from crypto import encrypted, sealed

    rng = np.random.default_rng(0)
    encoder = encrypted.encoder(CONTEXT, 0, KEY, rng)
    update = b"".join(encoder.encode(np.zeros(5, np.float32), 1))
    total = encrypted.accumulator(CONTEXT)
    total.add(0, io.BytesIO(update))
    summed = b"".join(total.result())

    def add(data: bytes) -> None:
        encrypted.accumulator(CONTEXT).add(0, io.BytesIO(overlaid(update, data)))

    def open_encrypted(data: bytes) -> None:
        encrypted.open_sum(CONTEXT, KEY, (0,), io.BytesIO(overlaid(summed, data)))

    def add_sealed(data: bytes) -> None:
        sealed.accumulator(COHORT).add(0, io.BytesIO(overlaid(update, data)))

    return add, open_encrypted, add_sealed


def run_one(data: bytes, parsers: tuple[Callable[[bytes], None], ...] = PARSERS) -> None:
    """Feed one case to the parser that its first byte chooses."""
    if not data:
        return
    try:
        parsers[data[0] % len(parsers)](data[1:])
    except CryptoError:
        return
