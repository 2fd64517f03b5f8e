"""Protection `encrypted`: exact sums of BFV ciphertexts; the coordinator reads nothing.

Device half: pack → tag → encrypt. Coordinator half: add. Opening half: decrypt → verify → unpack.
It is `sealed` without the masks, and needs no protocol between the members.

Who holds the run key opens any update that it sees: the coordinator and one agent together read
everything. That is what `sealed` is for.
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
from .codec import check_update
from .crew import count_processes, stepped
from .masks import Mask
from .members import check_members, refuse_masks
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
) -> "EncryptedEncoder":
    """Make the encoder of one member; `rng` only rounds."""
    refuse_masks(masks)
    return EncryptedEncoder(context, member, run_key, rng, processes)


def accumulator(context: UpdateContext, processes: int = 1) -> CiphertextTotal:
    """Make an empty total."""
    parameters = BfvParameters.derive(context)
    return CiphertextTotal(parameters, Kind.ENCRYPTED_UPDATE, Kind.ENCRYPTED_SUM, processes)


def open_sum(
    context: UpdateContext,
    run_key: RunKey | None,
    members: Sequence[int],
    source: Source,
    processes: int = 1,
) -> OpenedSum:
    """Open the sum of exactly these members' updates.

    Raises TagMismatch where it is another sum, OpeningFailed where it is none.
    """
    check_members(tuple(members), context)
    parameters = BfvParameters.derive(context)
    binding = Binding.of(context, Kind.ENCRYPTED_SUM, len(members), parameters.id)
    tagger = Tagger(parameters, run_key)
    with closing(decrypted(parameters, run_key, binding, source, processes)) as chunks:
        return unpacked(parameters, tagger.verified(chunks, members), len(members))


class EncryptedEncoder:
    """See `protection.Encoder`."""

    def __init__(
        self,
        context: UpdateContext,
        member: int,
        run_key: RunKey | None,
        rng: np.random.Generator,
        processes: int,
    ) -> None:
        self._parameters = BfvParameters.derive(context)
        self._binding = Binding.of(context, Kind.ENCRYPTED_UPDATE, member, self._parameters.id)
        self._member = member
        self._tagger = Tagger(self._parameters, run_key)
        self._run_key = run_key
        self._rng = rng
        self._processes = count_processes(processes, self._parameters.value_chunks)

    @property
    def encoded_size(self) -> int:
        return self._parameters.encoded_size(HEADER_SIZE, UPDATE_CIPHERTEXT)

    def encode(self, update: NDArray[np.float32], weight: int) -> Iterator[bytes]:
        check_update(update, weight, self._parameters.context)
        chunks = packed(self._parameters, update, weight, self._rng)
        chunks = self._tagger.tagged(chunks, self._member)
        step = partial(encrypted, self._parameters, self._run_key, self._binding)
        return stepped(step, chunks, self._processes)
