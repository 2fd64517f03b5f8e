"""When a run key has answered too often: a refused sum tells its maker up to one bit of it."""

from dataclasses import dataclass, replace

from ..errors import OpeningFailed

MAX_REFUSED_SUMS = 8


@dataclass(frozen=True)
class RefusedSums:
    """Sums that one run key refused, on one device. Keep it with the key; it outlives restarts."""

    key_id: int  # `WrapContext.key_id`
    count: int = 0

    def counted(self, refusal: Exception) -> "RefusedSums":
        """Return the count after a refusal: only those that depend on the key are counted."""
        if not isinstance(refusal, OpeningFailed):
            return self
        return replace(self, count=self.count + 1)

    @property
    def must_rotate(self) -> bool:
        """Say whether the device must open nothing more under this key and ask for another."""
        return self.count >= MAX_REFUSED_SUMS
