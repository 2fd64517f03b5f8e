"""Updates, and what may be learnt from them: pure mathematics on arrays and bytes.

A run names a protection; `protection(name)` returns its three functions: `encoder` on the device,
`accumulator` at the coordinator, `open_sum` on the device. TenSEAL is imported only when the
protection `encrypted` or `sealed` is asked for. How members agree on masks, and give them up, is
the subpackage `cohort`. The picture is in README.md.
"""

from .crew import MAX_PROCESSES
from .errors import (
    BackendMissing,
    CapacityExceeded,
    CryptoError,
    DuplicateMember,
    EmptyTotal,
    InvalidContext,
    InvalidUpdate,
    LocalFault,
    MalformedChunk,
    MemberSwapped,
    MissingKey,
    NotFinite,
    OpeningFailed,
    PeerFault,
    ProtocolFault,
    SpoiledTotal,
    TagMismatch,
    UnusableUpdate,
    UnwrapFailed,
    UpdateCountedTwice,
    UpdateLeftOut,
    WeightOutOfRange,
    WorkerLost,
    WrapRefused,
    WrongContext,
)
from .exponents import next_clip
from .masks import Correction, Mask
from .parameters import BfvParameters, PlainParameters, UpdateContext
from .protection import (
    Accumulator,
    Encoder,
    OpenedSum,
    Protection,
    ProtectionName,
    protection,
)
from .run_key import (
    RUN_KEY_SIZE,
    WRAPPED_KEY_SIZE,
    RunKey,
    WrapContext,
    generate_exchange_key,
    generate_run_key,
    unwrap,
    wrap,
)
from .wire import Source

__all__ = [
    "MAX_PROCESSES",
    "RUN_KEY_SIZE",
    "WRAPPED_KEY_SIZE",
    "Accumulator",
    "BackendMissing",
    "BfvParameters",
    "CapacityExceeded",
    "Correction",
    "CryptoError",
    "DuplicateMember",
    "EmptyTotal",
    "Encoder",
    "InvalidContext",
    "InvalidUpdate",
    "LocalFault",
    "MalformedChunk",
    "Mask",
    "MemberSwapped",
    "MissingKey",
    "NotFinite",
    "OpenedSum",
    "OpeningFailed",
    "PeerFault",
    "PlainParameters",
    "Protection",
    "ProtectionName",
    "ProtocolFault",
    "RunKey",
    "Source",
    "SpoiledTotal",
    "TagMismatch",
    "UnusableUpdate",
    "UnwrapFailed",
    "UpdateContext",
    "UpdateCountedTwice",
    "UpdateLeftOut",
    "WeightOutOfRange",
    "WorkerLost",
    "WrapContext",
    "WrapRefused",
    "WrongContext",
    "generate_exchange_key",
    "generate_run_key",
    "next_clip",
    "protection",
    "unwrap",
    "wrap",
]
