"""What the tests of `crypto` share: small contexts, uploads, and a sum to open."""

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from crypto import Correction, Mask, OpenedSum, RunKey, UpdateContext, protection
from crypto.protection import Accumulator, Encoder, ProtectionName

RUN_KEY = RunKey(bytes(range(32)))
MASKED = ("masked", "sealed")


def own_mask(member: int) -> Mask:
    return Mask(hashlib.sha256(b"mask of %d" % member).digest())


class Bench:
    """Both sides of one protection, in one place."""

    def __init__(self, name: ProtectionName) -> None:
        self.name = name
        self.protection = protection(name)
        self.run_key = None if name == "plain" else RUN_KEY
        self.masked = name in MASKED

    def context(self, **changes: Any) -> UpdateContext:
        fields: dict[str, Any] = {
            "run_id": bytes(range(16)),
            "round": 7,
            "attempt": 1,
            "parameter_count": 5000,
            "capacity": 4,
            "weight_cap": 100,
            "clip": 0.5,
            "cohort": bytes(range(32)) if self.masked else b"",
        }
        return UpdateContext(**(fields | changes))

    def upload(
        self, context: UpdateContext, member: int, update: np.ndarray, weight: int, seed: int = 0
    ) -> bytes:
        encoder = self.encoder(context, member, np.random.default_rng(seed))
        encoded = b"".join(encoder.encode(update, weight))
        assert len(encoded) == encoder.encoded_size
        return encoded

    def encoder(
        self,
        context: UpdateContext,
        member: int,
        rng: np.random.Generator,
        run_key: RunKey | None = None,
    ) -> Encoder:
        key = run_key or self.run_key
        return self.protection.encoder(context, member, key, rng, self.masks(member))

    def masks(self, *members: int) -> list[Mask] | None:
        return [own_mask(member) for member in members] if self.masked else None

    def correction(self, *members: int) -> Correction | None:
        return Correction(tuple(map(own_mask, members))) if self.masked else None

    def total(self, context: UpdateContext, *uploads: bytes) -> Accumulator:
        total = self.protection.accumulator(context)
        for member, encoded in enumerate(uploads):
            total.add(member, io.BytesIO(encoded))
        return total

    def summed(self, total: Accumulator) -> bytes:
        encoded = b"".join(total.result(self.correction(*total.members)))
        assert len(encoded) == total.encoded_sum_size
        return encoded

    def open(self, context: UpdateContext, members: tuple[int, ...], encoded: bytes) -> OpenedSum:
        return self.protection.open_sum(context, self.run_key, members, io.BytesIO(encoded))

    def through(
        self, context: UpdateContext, updates: list[np.ndarray], weights: list[int]
    ) -> OpenedSum:
        pairs = enumerate(zip(updates, weights, strict=True))
        uploads = [self.upload(context, i, update, weight, i) for i, (update, weight) in pairs]
        total = self.total(context, *uploads)
        return self.open(context, total.members, self.summed(total))


@pytest.fixture(params=["plain", "masked", "encrypted", "sealed"])
def bench(request: pytest.FixtureRequest) -> Bench:
    """Each protection in turn: the conformance suite runs against all."""
    return Bench(request.param)


@pytest.fixture
def encrypted() -> Bench:
    return Bench("encrypted")


@pytest.fixture(params=MASKED)
def masking(request: pytest.FixtureRequest) -> Bench:
    """Each protection whose sums carry masks."""
    return Bench(request.param)


@pytest.fixture(params=["masked", "encrypted", "sealed"])
def tagging(request: pytest.FixtureRequest) -> Bench:
    """Each protection whose sums carry tags."""
    return Bench(request.param)


@pytest.fixture
def plain() -> Bench:
    return Bench("plain")


@pytest.fixture
def random_update() -> Callable[..., np.ndarray]:
    """Make an update of float32 values, normal with the given standard deviation."""

    def make(count: int = 5000, seed: int = 0, deviation: float = 0.1) -> np.ndarray:
        values = np.random.default_rng(seed).standard_normal(count) * deviation
        return values.astype(np.float32)

    return make
