"""Compression as terms ask for it: what of a strategy's update travels, whatever the strategy."""

from fedloom.compression import Compression, chosen_count
from fedloom.strategies.random_mask import RandomMask, masked
from fedloom.strategies.rule import Algorithm, Places
from fedloom.strategies.top_k import largest_alone
from fedloom.terms import LocalTraining


def compressed(inner: Algorithm, terms: LocalTraining) -> Algorithm:
    """Return the algorithm of which a part travels; itself where all of it does."""
    match terms.compression:
        case Compression.RANDOM_MASK:
            return masked(inner, terms)
        case Compression.TOP_K:
            return largest_alone(inner, terms)
        case Compression.NONE | Compression.QUANTISED:  # the latter is how `plain` writes values
            return inner


def compressed_length(terms: LocalTraining, length: int) -> int:
    """Return how many values an update has, of `length` that the strategy would send."""
    if terms.compression is Compression.RANDOM_MASK:
        return chosen_count(terms.compression_share, length)
    return length


def waiting_places(terms: LocalTraining, rounds: int, length: int) -> Places | None:
    """Return where values that are sent wait, of `length` that a whole update has.

    None where nothing waits for the clip: without a mask or without error feedback.
    """
    if terms.compression is Compression.RANDOM_MASK and terms.error_feedback:
        return RandomMask.of(terms, rounds, length).places()
    return None


def listed_values(terms: LocalTraining, length: int) -> int:
    """Return how many of an update's `length` values an upload lists; 0: it has all of them."""
    if terms.compression is Compression.TOP_K:
        return chosen_count(terms.compression_share, length)
    return 0
