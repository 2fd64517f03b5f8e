"""Protection `sealed`: masks inside the ciphertexts, and tags inside the masks.

Device half: pack → tag → mask → encrypt. Coordinator half: add, then the correction that takes out
the masks left in the sum. Opening half: decrypt → verify → unpack.

The coordinator has no run key: it reads nothing, not even the sum. A member has the run key: what
it and the coordinator open together is an update under masks that only the sum of all accepted
members sheds. How the members agree on masks, and when they give them up, is `cohort`.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .chunks import packed, unpacked
from .ciphertexts import (
    UPDATE_CIPHERTEXT,
    CiphertextTotal,
    decrypted,
    encrypted,
)
from .codec import Chunks, check_update
from .crew import count_processes, stepped
from .masks import Mask, masked
from .members import check_members, require_masks
from .parameters import BfvParameters, UpdateContext
from .protection import OpenedSum
from .run_key import RunKey
from .tags import Tagger
from .wire import HEADER_SIZE, Binding, Kind, Source


def encoder(
    context: UpdateContext,
    member: int,
    run_key: RunKey | None,
    rng: np.random.Generator,
    masks: Sequence[Mask] | None = None,
    processes: int = 1,
) -> "SealedEncoder":
    """Make the encoder of one member; `rng` only rounds.

    `masks` are those that `cohort.member` gives for this attempt. What they masked must never
    change: an upload made again of another update, under the same masks, gives away both.
    """
    return SealedEncoder(context, member, run_key, rng, require_masks(masks), processes)


def accumulator(context: UpdateContext, processes: int = 1) -> CiphertextTotal:
    """Make an empty total; its `result` takes the correction."""
    parameters = BfvParameters.derive(context, "sealed")
    return CiphertextTotal(parameters, Kind.SEALED_UPDATE, Kind.SEALED_SUM, processes)


def open_sum(
    context: UpdateContext,
    run_key: RunKey | None,
    members: Sequence[int],
    source: Source,
    processes: int = 1,
) -> OpenedSum:
    """Open the sum of exactly these members' updates, from which the masks are out.

    Raises TagMismatch where it is another sum, or masks are left in it.
    """
    check_members(tuple(members), context)
    parameters = BfvParameters.derive(context, "sealed")
    binding = Binding.of(context, Kind.SEALED_SUM, len(members), parameters.id)
    tagger = Tagger(parameters, run_key)
    with closing(decrypted(parameters, run_key, binding, source, processes)) as chunks:
        return unpacked(parameters, tagger.verified(chunks, members), len(members))


class SealedEncoder:
    """See `protection.Encoder`."""

    def __init__(
        self,
        context: UpdateContext,
        member: int,
        run_key: RunKey | None,
        rng: np.random.Generator,
        masks: tuple[Mask, ...],
        processes: int,
    ) -> None:
        self._parameters = BfvParameters.derive(context, "sealed")
        self._binding = Binding.of(context, Kind.SEALED_UPDATE, member, self._parameters.id)
        self._member = member
        self._tagger = Tagger(self._parameters, run_key)
        self._run_key = run_key
        self._rng = rng
        self._processes = count_processes(processes, self._parameters.value_chunks)
        self._masks = masks

    @property
    def encoded_size(self) -> int:
        return self._parameters.encoded_size(HEADER_SIZE, UPDATE_CIPHERTEXT)

    def encode(self, update: NDArray[np.float32], weight: int) -> Iterator[bytes]:
        check_update(update, weight, self._parameters.context)
        chunks = packed(self._parameters, update, weight, self._rng)
        chunks = self._tagger.tagged(chunks, self._member)
        step = partial(_hidden, self._parameters, self._run_key, self._binding, self._masks)
        return stepped(step, chunks, self._processes)


def _hidden(
    parameters: BfvParameters,
    run_key: RunKey | None,
    binding: Binding,
    masks: tuple[Mask, ...],
    chunks: Chunks,
) -> Iterator[bytes]:
    """Mask and encrypt: what a worker does."""
    chunks = masked(chunks, masks, parameters.plain_bits)
    return encrypted(parameters, run_key, binding, chunks)
