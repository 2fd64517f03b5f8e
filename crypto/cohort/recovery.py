"""From releases to the masks that are left in a sum (Bonawitz et al., CCS 2017, §4, round 4).

Left in the sum of the accepted members A are their self masks, and for each member of the cohort
outside A its pairs with those inside. A seed comes from its owner, or from t shares where the owner
vanished after its upload; the mask key of a member outside A comes from t shares always.
"""

from collections.abc import Callable, Mapping

from ..errors import MalformedMessage, ShareMismatch, StepRefused
from ..masks import Correction, Mask
from .messages import Acceptance, Advertisement, Cohort, Release
from .quorum import neighbours, threshold
from .secrets import commitment, pair_mask, public_key, self_mask_key, usable
from .shamir import recover

Releases = Mapping[int, Release]


def check_advertised_keys(advertisement: Advertisement) -> None:
    """Refuse keys with which nobody could agree on a mask: they would stop the whole cohort."""
    if not (usable(advertisement.mask_key) and usable(advertisement.share_key)):
        raise MalformedMessage("advertised keys", "points of large order", "others")


def check_release(cohort: Cohort, acceptance: Acceptance, release: Release) -> None:
    """Refuse a release that is not one of an accepted member of this cohort."""
    if release.slot not in acceptance.slots:
        raise StepRefused("release", "one by an accepted member", f"slot {release.slot}")
    if len(release.shares) != len(cohort.members) - 1:
        raise MalformedMessage("shares", len(cohort.members) - 1, len(release.shares))
    if commitment(release.seed) != cohort.members[release.slot].commitment:
        raise ShareMismatch("released seed", "the one committed to", "another")


def recoverable(cohort: Cohort, acceptance: Acceptance, releases: Releases) -> bool:
    """Say whether these releases suffice."""
    needed = threshold(len(cohort.members))
    incomplete = set(range(len(cohort.members))) - set(releases)
    return bool(releases) and (not incomplete or len(releases) >= needed)


def correction(cohort: Cohort, acceptance: Acceptance, releases: Releases) -> Correction:
    """Return the masks left in the sum of the accepted updates.

    Raises ShareMismatch where the shares are too few, or wrong ones among them hide the secret.
    """
    accepted = acceptance.slots
    left, groups = [], []
    for slot in accepted:
        seed = _seed(cohort, releases, slot)
        left.append(Mask(self_mask_key(seed, cohort.digest, slot)))
        groups.append(cohort.group_of[slot])
    for slot in sorted(set(range(len(cohort.members))) - set(accepted)):
        pairs = _pairs_left(cohort, accepted, releases, slot)
        left += pairs
        groups += [cohort.group_of[slot]] * len(pairs)
    return Correction(tuple(left), tuple(groups))


def _seed(cohort: Cohort, releases: Releases, slot: int) -> bytes:
    if slot in releases:
        return releases[slot].seed
    promised = cohort.members[slot].commitment
    return _recovered(cohort, releases, slot, lambda seed: commitment(seed) == promised)


def _pairs_left(
    cohort: Cohort, accepted: tuple[int, ...], releases: Releases, vanished: int
) -> list[Mask]:
    """Return the masks that accepted members added for one who never uploaded."""
    advertised = cohort.members[vanished].mask_key
    key = _recovered(cohort, releases, vanished, lambda found: public_key(found) == advertised)
    members = len(cohort.members)
    near = set(neighbours(cohort.digest, members, vanished, cohort.group_of)) & set(accepted)
    theirs = (pair_mask(key, cohort, vanished, other) for other in sorted(near))
    return [Mask(mask.key, -mask.sign) for mask in theirs]  # with the sign of the other side


def _recovered(
    cohort: Cohort, releases: Releases, owner: int, right: Callable[[bytes], bool]
) -> bytes:
    """Recover an owner's secret; one wrong share among more than t is stepped over."""
    needed = threshold(len(cohort.members))
    shares = {
        slot: release.shares[owner - (owner > slot)]
        for slot, release in releases.items()
        if slot != owner
    }
    holders = sorted(shares)
    for start in range(len(holders) - needed + 1):
        window = {slot: shares[slot] for slot in holders[start : start + needed]}
        try:
            secret = recover(window, needed)
        except ShareMismatch:
            continue
        if right(secret):
            return secret
    raise ShareMismatch(f"shares of slot {owner}", f"{needed} right ones", f"{len(shares)} in all")
