"""Write the known answers: `python tests/vectors/make_vectors.py`. Everything here is fixed.

One file for each group of steps; bytes are hexadecimal, long ones as their SHA-256 and length.
`negative.json` holds inputs that must be refused and the class of error that says why. A ciphertext
depends on SEAL's randomness, so the vector fixes what it is a function of: c0 of a known noise.
"""

import hashlib
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crypto import Correction, Mask, RunKey, UpdateContext, masked, plain
from crypto.chunks import packed
from crypto.cohort import (
    Acceptance,
    Advertisement,
    AttemptId,
    Boxes,
    Certificate,
    Cohort,
    Endorsement,
    Release,
    quorum,
    threshold,
)
from crypto.cohort.quorum import neighbours
from crypto.cohort.secrets import (
    AttemptSecret,
    commitment,
    public_key,
    self_mask_key,
)
from crypto.cohort.shamir import deal
from crypto.exponents import next_clip
from crypto.parameters import MODULUS, BfvParameters, PlainParameters
from crypto.run_key import ternary_secret
from crypto.tags import Tagger
from crypto.wire import Binding, Kind, planes_of
from fedloom.compression import chosen_count
from fedloom.strategies.random_mask import RandomMask

HERE = Path(__file__).parent
RUN_ID, RUN_KEY = bytes(range(16)), RunKey(bytes(range(32)))
ATTEMPT = AttemptId(RUN_ID, 7, 1)
NAMES = ("alpha", "beta", "gamma", "delta")
WEIGHTS = (1, 5, 100, 3)


class NoRounding(np.random.Generator):
    """Draws that never round up: the vectors need no generator of numpy's."""

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        return np.full(size, 0.999, dtype)


def rounding() -> np.random.Generator:
    return NoRounding(np.random.PCG64(0))


def secret_of(name: str) -> AttemptSecret:
    return AttemptSecret(hashlib.sha256(b"secret of " + name.encode()).digest(), ATTEMPT)


def cohort() -> Cohort:
    members = []
    for name in sorted(NAMES, key=str.encode):
        secret = secret_of(name)
        keys = public_key(secret.mask_key), public_key(secret.share_key)
        signature = hashlib.sha512(b"signature of " + name.encode()).digest()
        members.append(Advertisement(ATTEMPT, name, *keys, commitment(secret.seed), signature))
    return Cohort(ATTEMPT, 3, tuple(members))


def context(cohort_digest: bytes = b"") -> UpdateContext:
    return UpdateContext(RUN_ID, 7, 1, 10, 4, 100, 0.5, 16, cohort_digest)


def update(slot: int) -> np.ndarray:
    """Ten values in -0.6 .. 0.6: some saturate."""
    return (np.arange(10, dtype=np.float32) - 4.5) * np.float32(0.1 + 0.01 * slot)


def hidden(encoded: bytes) -> dict[str, object]:
    return {"size": len(encoded), "sha256": hashlib.sha256(encoded).hexdigest()}


def member_masks(slot: int) -> tuple[Mask, ...]:
    group = cohort()
    return secret_of(group.members[slot].agent_id).masks(group, slot)


def masked_upload(slot: int) -> bytes:
    encoder = masked.encoder(
        context(cohort().digest), slot, RUN_KEY, rounding(), member_masks(slot)
    )
    return b"".join(encoder.encode(update(slot), WEIGHTS[slot]))


def masked_sum(slots: tuple[int, ...]) -> bytes:
    group = cohort()
    total = masked.accumulator(context(group.digest))
    left = []
    for slot in slots:
        total.add(slot, io.BytesIO(masked_upload(slot)))
        secret = secret_of(group.members[slot].agent_id)
        left.append(Mask(self_mask_key(secret.seed, group.digest, slot)))
        for other, mask in zip(
            neighbours(group.digest, 4, slot), member_masks(slot)[1:], strict=True
        ):
            left += [mask] if other not in slots else []
    return b"".join(total.result(Correction(tuple(left))))


def keys() -> dict[str, object]:
    group = cohort()
    secrets = [secret_of(member.agent_id) for member in group.members]
    return {
        "run_id": RUN_ID.hex(),
        "run_key": RUN_KEY.secret.hex(),
        "bfv_secret": hidden(ternary_secret(RUN_KEY, RUN_ID).tobytes()),
        "tag_key": RUN_KEY.derive("tag key", RUN_ID).hex(),
        "members": [
            {
                "agent_id": member.agent_id,
                "attempt_secret": secret.value.hex(),
                "mask_private": secret.mask_key.hex(),
                "mask_public": member.mask_key.hex(),
                "share_private": secret.share_key.hex(),
                "share_public": member.share_key.hex(),
                "seed": secret.seed.hex(),
                "commitment": member.commitment.hex(),
                "masks": [
                    {"key": mask.key.hex(), "sign": mask.sign} for mask in member_masks(slot)
                ],
                "boxes": [box.hex() for box in secret.boxes(group, slot)],
            }
            for slot, (member, secret) in enumerate(zip(group.members, secrets, strict=True))
        ],
    }


def messages() -> dict[str, object]:
    group = cohort()
    secret = secret_of("alpha")
    uploads = tuple((slot, hashlib.sha256(masked_upload(slot)).digest()) for slot in range(3))
    acceptance = Acceptance(ATTEMPT, group.digest, uploads)
    signature = group.members[0].signature
    rows = tuple((slot, group.members[slot].signature) for slot in range(3))
    shares = tuple(deal(secret.seed, bytes(range(96)), (1, 2, 3)).values())
    found = {
        "advertisement": group.members[0],
        "cohort": group,
        "grouped_cohort": replace(group, groups=2),
        "boxes": Boxes(ATTEMPT, 0, secret.boxes(group, 0)),
        "acceptance": acceptance,
        "endorsement": Endorsement(ATTEMPT, 0, signature),
        "certificate": Certificate(ATTEMPT, acceptance.digest, rows),
        "release": Release(ATTEMPT, 0, secret.seed, shares),
    }
    return {
        "encoded": {name: message.encode().hex() for name, message in found.items()},
        "cohort_digest": group.digest.hex(),
        "grouped_cohort_digest": replace(group, groups=2).digest.hex(),
        "groups": replace(group, groups=2).group_of,
        "acceptance_digest": acceptance.digest.hex(),
        "advertisement_statement": group.members[0].statement().hex(),
        "acceptance_statement": acceptance.statement().hex(),
        "ring_of_70": list(neighbours(group.digest, 70, 0)),
        "quorum_and_threshold": {str(n): [quorum(n), threshold(n)] for n in (2, 3, 4, 7, 100)},
    }


def shares() -> dict[str, object]:
    secret = bytes(range(32))
    dealt = deal(secret, bytes(range(96)), (0, 1, 2, 3, 9))
    return {
        "secret": secret.hex(),
        "randomness": bytes(range(96)).hex(),
        "threshold": 3,
        "shares": {str(slot): share.hex() for slot, share in dealt.items()},
    }


def sums() -> dict[str, object]:
    group = cohort()
    inner = context(group.digest)
    parameters = BfvParameters.derive(inner, "masked")
    chunks = packed(parameters, update(0), WEIGHTS[0], rounding())
    tagged = [words.copy() for _, words in Tagger(parameters, RUN_KEY).tagged(chunks, 0)]
    mask = Mask(bytes(range(32)))
    opened = masked.open_sum(inner, RUN_KEY, (0, 1, 2), io.BytesIO(masked_sum((0, 1, 2))))
    return {
        "updates": [update(slot).tobytes().hex() for slot in range(4)],
        "weights": WEIGHTS,
        "parameters_ids": {
            "encrypted": BfvParameters.derive(context()).id.hex(),
            "masked": parameters.id.hex(),
            "sealed": BfvParameters.derive(inner, "sealed").id.hex(),
        },
        "plain_bits": parameters.plain_bits,
        "packed_values": [int(word) for word in tagged[0][:8]],
        "packed_counters": [int(word) for word in tagged[1][:20]],
        "mask_stream": [
            int(word) for word in -Correction((mask,)).words(3, 4, 64).astype(np.uint64)
        ],
        "masked_upload": hidden(masked_upload(0)),
        "masked_sum_of_0_1_2_after_3_vanished": hidden(masked_sum((0, 1, 2))),
        "opened_mean": opened.mean.tobytes().hex(),
        "opened_weight": opened.total_weight,
        "opened_saturated": opened.saturated,
        "opened_exponents": opened.exponents,
        "next_clip": next_clip(0.5, opened.exponents),
        "header": Binding.of(inner, Kind.SEALED_UPDATE, 2, parameters.id).header(0, 1).hex(),
    }


def ciphertext() -> dict[str, object]:
    """Encrypt by the book (README): c1 = 7·x, noise e = 1, and m = 5 + 2·x; all else zero."""
    secret = ternary_secret(RUN_KEY, RUN_ID).astype(object)
    t = 1 << BfvParameters.derive(context()).plain_bits
    shifted = np.concatenate([[-secret[-1]], secret[:-1]])  # x·s in Z[x]/(x^4096 + 1)
    c0 = -7 * shifted
    for place, m in enumerate((5, 2)):
        c0[place] += (MODULUS * m + t // 2) // t
    c0 = (c0 + 1) % MODULUS
    words = np.array([int(c) for c in c0], np.uint64)
    planes = bytearray(7 * 4096)
    planes_of(words, memoryview(planes), slice(0, 4096), 4096)
    return {
        "plain_bits": t.bit_length() - 1,
        "c1": "7 at x^1, zero elsewhere",
        "noise": "1 everywhere",
        "message": [5, 2],
        "c0_first": [int(c) for c in c0[:4]],
        "c0_planes": hidden(bytes(planes)),
    }


def random_mask() -> dict[str, object]:
    rows = []
    for seed, rounds, length, share in (
        (0, 0, 10, 0.25),
        (0, 1, 10, 0.25),
        (2**64 - 1, 7, 1000, 0.01),
        (5, 3, 100_000, 0.3),
    ):
        mask = RandomMask(seed, rounds, length, chosen_count(share, length))
        places = [int(place) for place in mask.places()]
        short = {"places": places} if len(places) < 20 else {"first": places[:10]}
        rows.append(
            {"seed": seed, "rounds": rounds, "length": length, "share": share}
            | {"count": mask.count, "u32_places": hidden(mask.places().astype("<u4").tobytes())}
            | short
        )
    return {"masks": rows}


def plain_context(form: str) -> UpdateContext:
    """Eight values and a tail of two, in one of the forms of `plain`."""
    forms = {"all": {}, "listed": {"listed": 3}, "quantised": {"quantised": True}}
    return replace(context(), tail_length=2, **forms[form])


def plain_upload(form: str, slot: int = 0) -> bytes:
    values = np.float32([0, -0.5, 0, 0.25, 0, 0, 0.125, 0, 0.0625, 1])
    return b"".join(
        plain.encoder(plain_context(form), slot, None, rounding()).encode(values, WEIGHTS[slot])
    )


def plain_forms() -> dict[str, object]:
    found: dict[str, object] = {}
    for form in ("all", "listed", "quantised"):
        total = plain.accumulator(plain_context(form))
        for slot in range(2):
            total.add(slot, io.BytesIO(plain_upload(form, slot)))
        found[form] = {
            "parameters_id": PlainParameters(plain_context(form)).id.hex(),
            "upload": plain_upload(form).hex(),
            "sum_of_slots_0_and_1": b"".join(total.result()).hex(),
        }
    return found


def plain_refused() -> list[dict[str, object]]:
    """Uploads of `plain_forms`, edited: what no adder may take."""
    nan, minus = "0000c07f", "000000bf"
    rows = (
        ("nothing is wrong, listed", "listed", [], ""),
        ("nothing is wrong, quantised", "quantised", [], ""),
        ("a place twice", "listed", [[60, "010000000100000006000000"]], "MalformedChunk"),
        ("places descend", "listed", [[60, "030000000100000006000000"]], "MalformedChunk"),
        ("a place in the tail", "listed", [[68, "08000000"]], "MalformedChunk"),
        ("a place beyond all", "listed", [[68, "ffffffff"]], "MalformedChunk"),
        ("a listed NaN", "listed", [[72, nan]], "NotFinite"),
        ("a NaN in the tail", "listed", [[84, nan]], "NotFinite"),
        ("a scale that is NaN", "quantised", [[60, nan]], "NotFinite"),
        ("a scale below 0", "quantised", [[60, minus]], "MalformedChunk"),
        ("a level of -128", "quantised", [[64, "80"]], "MalformedChunk"),
    )
    names = ("what", "form", "edits", "error")
    return [{"kind": "plain upload"} | dict(zip(names, row, strict=True)) for row in rows]


def negative() -> list[dict[str, object]]:
    group = cohort()
    encoded = {name: bytes.fromhex(text) for name, text in messages()["encoded"].items()}
    return [
        *sums_refused(),
        *plain_refused(),
        *(
            {"what": f"{name}, {what}", "kind": "message", "bytes": data.hex()}
            | {"error": "MalformedMessage"}
            for name, whole in encoded.items()
            for what, data in (
                ("one byte short", whole[:-1]),
                ("one byte more", whole + b"\0"),
                ("another magic", b"X" + whole[1:]),
                ("another version", whole[:4] + b"\2" + whole[5:]),
            )
        ),
        {
            "what": "members in descending order",
            "kind": "message",
            "bytes": (
                group.encode()[:32] + b"".join(m.entry() for m in reversed(group.members))
            ).hex(),
            "error": "MalformedMessage",
        },
    ]


def sums_refused() -> list[dict[str, object]]:
    """Each takes a file of this folder, writes bytes at offsets, and cuts the end off."""
    three, two = "masked_sum_of_0_1_2.bin", "masked_sum_of_0_1.bin"
    size = 52 + 7 * 4096  # of a chunk: the counters come first
    first = masked_sum((0, 1, 2))[size + 52]
    tampered = [[size + 52, f"{first ^ 1:02x}"]]
    as_three = [[6, "0300"], [size + 6, "0300"]]
    too_large = [[size + 52 + 6 * 4096, "ff"]]  # bit 55 of a word
    rows = (
        ("nothing is wrong", three, [], 0, [0, 1, 2], ""),
        ("a coefficient is altered", three, tampered, 0, [0, 1, 2], "TagMismatch"),
        ("an update is left out", two, as_three, 0, [0, 1, 2], "UpdateLeftOut"),
        ("another member is accepted", three, [], 0, [0, 1, 3], "MemberSwapped"),
        ("another number of updates", three, [], 0, [0, 1], "WrongContext"),
        ("another round in the header", three, [[8, "08"]], 0, [0, 1, 2], "WrongContext"),
        ("one byte short", three, [], 1, [0, 1, 2], "MalformedChunk"),
        ("a word beyond 2^T", three, too_large, 0, [0, 1, 2], "MalformedChunk"),
    )
    names = ("what", "file", "edits", "cut", "members", "error")
    return [{"kind": "masked sum"} | dict(zip(names, row, strict=True)) for row in rows]


GROUPS = {
    "keys": keys,
    "messages": messages,
    "shares": shares,
    "sums": sums,
    "ciphertext": ciphertext,
    "random_mask": random_mask,
    "plain_forms": plain_forms,
    "negative": negative,
}


def main() -> None:
    for name, group in GROUPS.items():
        text = json.dumps(group(), indent=1) + "\n"
        (HERE / f"{name}.json").write_text(text)
        sys.stdout.write(f"{name}.json {len(text)} bytes\n")
    (HERE / "masked_sum_of_0_1_2.bin").write_bytes(masked_sum((0, 1, 2)))
    (HERE / "masked_sum_of_0_1.bin").write_bytes(masked_sum((0, 1)))


if __name__ == "__main__":
    main()
