"""What of a movement travels: the choices, and which of them go together.

Under every protection: fewer places, the same for all (`strategies.random_mask`). Under `plain`,
whose coordinator reads every update, each agent's own places too (`strategies.top_k`), or fewer
bits for each value (`crypto.plain_forms`). What is not sent may wait on the device
(`strategies.error_feedback`).
"""

import math
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedloom.terms import LocalTraining

LARGEST_TOP_SHARE = 0.5  # a listed value takes 8 bytes, a plain one 4
# Whose updates are a movement and nothing else: what waits on a device is a movement too.
MOVEMENTS = ("FED_AVG", "FED_PROX", "FED_AVG_M", "FED_ADAGRAD", "FED_ADAM", "FED_YOGI")
READ_WHOLE = ("FLORA", "FLEXLORA", "FEDEX")  # LoRA rules that make new factors of all that is sent


class Compression(IntEnum):
    """What of a movement travels."""

    NONE = 1
    RANDOM_MASK = 2
    TOP_K = 3
    QUANTISED = 4

    @property
    def chooses(self) -> bool:
        """Whether some values travel and others do not."""
        return self in (Compression.RANDOM_MASK, Compression.TOP_K)

    @property
    def needs_plain(self) -> bool:
        """Whether updates differ in what they hold, so that only their reader can add them."""
        return self in (Compression.TOP_K, Compression.QUANTISED)


def chosen_count(share: float, length: int) -> int:
    """Return k, how many of `length` values travel: the product in float64, rounded up."""
    return math.ceil(share * length)


def compression_problem(terms: "LocalTraining") -> str:
    """Say what keeps the terms from going together, and what is nearest; nothing where they do."""
    kind, share, name = terms.compression, terms.compression_share, terms.compression.name
    if kind is not Compression.NONE and terms.strategy.name not in MOVEMENTS:
        return (
            f"expected compression NONE with {terms.strategy.name}, whose server counts on whole "
            f"updates (or strategy FED_AVG or FED_PROX, or fewer bits by protection.update_bits), "
            f"found {name}"
        )
    if kind is not Compression.NONE and terms.lora.name in READ_WHOLE:
        return (
            f"expected compression NONE with lora {terms.lora.name}, which reads every factor of "
            f"every agent (or lora FFA, or FEDIT at a smaller rank), found {name}"
        )
    if kind is Compression.RANDOM_MASK and not 0 < share < 1:
        return f"expected compression_share above 0 and below 1 with {name}, found {share}"
    if kind is Compression.TOP_K and not 0 < share <= LARGEST_TOP_SHARE:
        return (
            f"expected compression_share above 0 and at most {LARGEST_TOP_SHARE} with {name}, "
            f"which lists places too: more is sent by QUANTISED in fewer bytes; found {share}"
        )
    if not kind.chooses and share:
        return f"expected compression_share 0 with compression {name}, found {share}"
    if terms.error_feedback and not kind.chooses:
        return (
            f"expected error_feedback false with compression {name}, which leaves nothing behind "
            "(QUANTISED rounds without bias)"
        )
    if terms.unbiased and (kind is not Compression.RANDOM_MASK or terms.error_feedback):
        return (
            "expected unbiased false unless compression is RANDOM_MASK without error_feedback, "
            "which sends later what unbiased makes up for at once"
        )
    return ""
