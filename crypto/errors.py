"""Everything that this package refuses, as one tree.

    CryptoError
    ├── LocalFault              the caller's doing, or this machine's
    │   ├── InvalidContext      no parameters exist for what the context asks for
    │   ├── InvalidUpdate       not a one-dimensional float32 array of the agreed length
    │   ├── MissingKey          the protection needs a run key and got none, or the reverse
    │   ├── EmptyTotal          a sum of nothing was asked for
    │   ├── SpoiledTotal        an upload changed while it was being added: build the total anew
    │   ├── IllegalStep         our own code took a step that the protocol's state does not allow
    │   ├── WorkerLost          a worker process ended before its work was done
    │   └── BackendMissing      TenSEAL or Zstandard is not installed, or is another SEAL
    ├── UnusableUpdate          well-formed and meaningless: the encoder's caller, or the peer
    │   ├── NotFinite           a NaN or an infinity among the values
    │   └── WeightOutOfRange    not in 1 .. weight_cap
    └── PeerFault               foreign bytes that were refused; nothing has changed
        ├── MalformedChunk      wrong length, magic, version, kind, order, or an impossible residue
        ├── WrongContext        well-formed, and bound to another run, round, attempt, member …
        ├── DuplicateMember     this member's update is in the sum already
        ├── CapacityExceeded    the sum holds as many updates as it can stay exact for
        ├── OpeningFailed       the sum does not decrypt to what its members could have sent
        │   └── TagMismatch             it is not the sum of exactly the accepted updates
        │       ├── UpdateLeftOut           one accepted update is missing from it
        │       ├── UpdateCountedTwice      one accepted update is in it twice
        │       └── MemberSwapped           another's update took the place of an accepted one
        ├── ProtocolFault       a message of the masks' protocol (`cohort`) was refused
        │   ├── MalformedMessage        not of the one length and form that it can have
        │   ├── BadSignature            not signed by the agent that it names
        │   ├── StaleAttempt            of an attempt that is over, or of a round already released
        │   ├── StepRefused             fits no step that this attempt has come to
        │   ├── CohortRefused           a cohort that an agent must not mask for
        │   ├── SharesRefused           a box of shares does not open
        │   ├── Equivocation            another cohort or list than the one already taken up
        │   ├── AcceptanceRefused       an accepted list without our upload, or with too few
        │   ├── CertificateRefused      too few members vouch for the accepted list
        │   └── ShareMismatch           what was released or recovered is not what was committed to
        ├── WrapRefused         the recipient's public key is not one that may be used
        └── UnwrapFailed        the wrapped key is not for this recipient, run, key id and sender

Every error carries `subject`, `expected` and `found`. None of them ever carries key material, a
decrypted value or a seed: error texts end up in logs.
"""


class CryptoError(Exception):
    """Base of all refusals of this package."""

    def __init__(self, subject: str, expected: object, found: object) -> None:
        super().__init__(f"{subject}: expected {expected}, found {found}")
        self.subject = subject
        self.expected = expected
        self.found = found

    def __reduce__(self) -> tuple[type["CryptoError"], tuple[str, object, object]]:
        """Copy from the fields: a worker's errors are raised in the process that it works for."""
        return type(self), (self.subject, self.expected, self.found)


class LocalFault(CryptoError):
    """The caller's doing, or this machine's."""


class InvalidContext(LocalFault):
    """No parameters exist for what the context asks for."""


class InvalidUpdate(LocalFault):
    """The update is not a one-dimensional float32 array of the agreed length."""


class MissingKey(LocalFault):
    """The protection needs a run key and got none, or the reverse."""


class EmptyTotal(LocalFault):
    """A sum of nothing was asked for."""


class SpoiledTotal(LocalFault):
    """An upload changed, or could not be read, after it had been validated.

    The total may hold half an update. Build a new one from the stored uploads.
    """


class IllegalStep(LocalFault):
    """Our own code took a step that the protocol's state does not allow."""


class WorkerLost(LocalFault):
    """A worker process ended before its work was done: killed, or out of memory."""


class BackendMissing(LocalFault):
    """TenSEAL or Zstandard is not installed, or contains a SEAL that behaves otherwise."""


class UnusableUpdate(CryptoError):
    """A well-formed update without meaning.

    Raised by an encoder it is the caller's fault, raised by an accumulator the peer's.
    """


class NotFinite(UnusableUpdate):
    """A NaN or an infinity is among the values."""


class WeightOutOfRange(UnusableUpdate):
    """The weight is not in 1 .. weight_cap."""


class PeerFault(CryptoError):
    """Foreign bytes were refused; nothing has changed."""


class MalformedChunk(PeerFault):
    """The bytes are not of the one shape that the context implies."""


class WrongContext(PeerFault):
    """The bytes are well-formed and bound to something else."""


class DuplicateMember(PeerFault):
    """This member's update is in the sum already."""


class CapacityExceeded(PeerFault):
    """The sum holds as many updates as it can stay exact for."""


class OpeningFailed(PeerFault):
    """The sum does not decrypt to anything that its members could have sent together.

    A wrong key, a wrong list of members, or a sum that was tampered with. Count these: an answer
    to a chosen ciphertext tells its maker up to one bit about the key, so rotate after 8.
    """


class TagMismatch(OpeningFailed):
    """The tags say that this is not the sum of exactly the accepted updates.

    Altered coefficients, a replay, or a list of members that is not that of the sum. What the
    coordinator may be told is that the sum was refused, not which of these errors it was.
    """


class UpdateLeftOut(TagMismatch):
    """One accepted update is missing from the sum."""


class UpdateCountedTwice(TagMismatch):
    """One accepted update is in the sum twice."""


class MemberSwapped(TagMismatch):
    """Another member's update is in the sum in place of an accepted one."""


class ProtocolFault(PeerFault):
    """A message of the masks' protocol was refused."""


class MalformedMessage(ProtocolFault):
    """The bytes are not of the one length and form that such a message can have."""


class BadSignature(ProtocolFault):
    """The message is not signed by the agent that it names."""


class StaleAttempt(ProtocolFault):
    """The message is of an attempt that is over, or of a round that was already released."""


class StepRefused(ProtocolFault):
    """The message fits no step that this attempt has come to."""


class CohortRefused(ProtocolFault):
    """An agent must not mask for this cohort: too small, unordered, or without it."""


class SharesRefused(ProtocolFault):
    """A box of shares does not open, or boxes are missing."""


class Equivocation(ProtocolFault):
    """The coordinator shows another cohort or list than the one already taken up."""


class AcceptanceRefused(ProtocolFault):
    """The accepted list lacks our upload as we sent it, or is too short."""


class CertificateRefused(ProtocolFault):
    """Too few members of the accepted list vouch for it."""


class ShareMismatch(ProtocolFault):
    """What was released or recovered is not what its owner committed to."""


class WrapRefused(PeerFault):
    """The recipient's public key is not one that may be used."""


class UnwrapFailed(PeerFault):
    """The wrapped key was tampered with, or is not for this recipient, run, key id and sender."""
