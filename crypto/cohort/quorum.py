"""How many members it takes, and who masks with whom. All of it follows from public numbers.

With n members of a cohort, of whom c collude with the coordinator:

    quorum     Q = ⌊2n/3⌋ + 1      members of an accepted list, and of those who vouch for it
    threshold  t = ⌊2(n-1)/3⌋ + 1  shares that recover a secret, of the n-1 that its owner dealt

Bonawitz et al. (CCS 2017, eprint 2017/281, §6.2 and theorem 6.5) choose t above 2n/3 for the same
two reasons. Two accepted lists of one attempt need 2Q vouchers, and an honest member vouches once:
2Q ≤ n + c is impossible for c ≤ 2Q - n - 1. And c < t colluders recover nothing by themselves. So
`tolerated(n)`, the smaller of 2Q - n - 1 and t - 1, is the largest c for which the claims hold:

    n          2  3  4  5  6  7  8  9 10 16 32 64 100
    Q          2  3  3  4  5  5  6  7  7 11 22 43  67
    t          1  2  3  3  4  5  5  6  7 11 21 43  67
    tolerated  0  1  1  2  3  2  3  4  3  5 11 21  33

At least Q - c members of a sum are honest: two for n = 3, 4, 5. A sum of few is a sum of few
whatever the masks do, so the minimum of a cohort is each device's rule, 3 at least.

Neighbours. Up to n = 65 every pair shares a mask. Above, the members stand on a ring in the order
of SHA-256(`fedloom v1 ring\\0` cohort digest, slot u16) and each masks with the 32 next on either
side: the Harary graph on randomly permuted vertices of Bell et al. (CCS 2020, eprint 2020/704,
§3.3), k = 64. Taking members out of a ring disconnects the others only if two runs of 32 successive
members are out, so with a share g of colluders it is disconnected with probability at most
n²/2 · g^64: for g = 1/3 and n = 1,000 below 2^-82. Colluders may choose their keys after seeing
the others', to try for another ring: 2^48 tries leave 2^-34.

The bound holds for members who were fixed before the ring was known. A coordinator that *claims*
drop-outs picks them afterwards, and could cut the ring around one member with 64 claims. Therefore
a sparse cohort accepts all of its members or re-forms; a complete one may lack a third of them.

Groups (`crypto.groups`). Where a cohort has several, each has a sum of its own, and what is said
above holds for each: masks are shared inside a group, Q and what a list lacks at most are counted
in each group of m members, and c of a group is at most tolerated(m). Only t is counted over all.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

MASK_DEGREE = 64  # k, even
SECRET_SIZE = 32


def quorum(members: int) -> int:
    """Return Q for a cohort of n members."""
    return 2 * members // 3 + 1 if members > 1 else 1


def threshold(members: int) -> int:
    """Return t for a cohort of n members."""
    return 2 * (members - 1) // 3 + 1


def tolerated(members: int) -> int:
    """Return the largest number of colluding members for which the claims hold."""
    return max(0, min(2 * quorum(members) - members - 1, threshold(members) - 1))


def least_accepted(members: int, minimum: int) -> int:
    """Return how many updates a sum must have at least: all, where not all pairs share masks."""
    return max(minimum, quorum(members)) if complete(members) else members


def complete(members: int) -> bool:
    """Say whether every pair of the cohort shares a mask."""
    return members <= MASK_DEGREE + 1


def enough(group_of: Sequence[int], slots: Iterable[int], least: Callable[[int], int]) -> bool:
    """Say whether of every group, of m members, at least `least(m)` are among these slots."""
    sizes, found = Counter(group_of), Counter(group_of[slot] for slot in slots)
    return all(found[group] >= least(size) for group, size in sizes.items())


def neighbours(
    digest: bytes, members: int, slot: int, group_of: Sequence[int] = ()
) -> tuple[int, ...]:
    """Return the slots with which this one shares masks, ascending: all in its group."""
    group = [other for other in range(members) if not group_of or group_of[other] == group_of[slot]]
    members = len(group)
    if complete(members):
        return tuple(other for other in group if other != slot)
    ring = _ring(digest, group)
    place = ring.index(slot)
    near = range(1, MASK_DEGREE // 2 + 1)
    ahead = [ring[(place + step) % members] for step in near]
    behind = [ring[place - step] for step in near]
    return tuple(sorted(ahead + behind))


def _ring(digest: bytes, members: Iterable[int]) -> list[int]:
    def key(slot: int) -> bytes:
        return hashlib.sha256(b"fedloom v1 ring\0" + digest + struct.pack("<H", slot)).digest()

    return sorted(members, key=key)
