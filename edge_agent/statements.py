"""What this device says of a model version that it made, signed with its identity key.

`version.json` holds the statement, `version.sig` the Ed25519 signature (64 bytes) over the ASCII
label `fedloom v1 model version`, a zero byte, and the bytes of `version.json`. The statement names
the adapter's and the plan's SHA-256, and the plan those of graphs, base and tokenizer: the one
signature stands for every byte that answers.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_agent.engine import Evaluation
from fedloom.errors import Reason, Refused
from fedloom.secret_files import write_secret

STATEMENT_FILE = "version.json"
SIGNATURE_FILE = "version.sig"
MAX_STATEMENT_BYTES = 1 << 16
_LABEL = b"fedloom v1 model version\0"
_MEASURED = ("count", "correct", "mean_loss")  # what is said of an evaluation


@dataclass(frozen=True)
class Statement:
    """One version of one adapter; digests, run and agent in the forms that people compare."""

    adapter: str
    version: int  # from 1
    agent: str
    run: str  # hexadecimal
    round: int
    plan: str  # SHA-256 of plan.binpb, hexadecimal
    adapter_sha256: str  # of its file, hexadecimal; "" where the version was refused
    made_at: str  # ISO 8601, UTC
    evaluation: Evaluation | None = None  # on this device's held-out data
    refused: str = ""  # why it must not answer; it has no files then


def write_statement(folder: Path, statement: Statement, key: Ed25519PrivateKey) -> None:
    """Put the statement and its signature into a version's folder."""
    values = asdict(statement)
    if statement.evaluation is not None:
        values["evaluation"] = {name: values["evaluation"][name] for name in _MEASURED}
    text = json.dumps(values, sort_keys=True, indent=1).encode()
    write_secret(folder / STATEMENT_FILE, text)  # on the disk before the version has its name
    write_secret(folder / SIGNATURE_FILE, key.sign(_LABEL + text))


def read_statement(folder: Path, key: Ed25519PublicKey) -> Statement:
    """Return what was said; raises Refused(PLAN_MISMATCH) unless this key signed those bytes."""
    try:
        with (folder / STATEMENT_FILE).open("rb") as file:
            text = file.read(MAX_STATEMENT_BYTES)
        signature = (folder / SIGNATURE_FILE).read_bytes()
        key.verify(signature, _LABEL + text)
    except (OSError, InvalidSignature) as error:
        found = error.strerror if isinstance(error, OSError) else "other bytes or another signature"
        raise Refused(
            Reason.PLAN_MISMATCH,
            f"expected {STATEMENT_FILE} of version {folder.name} as this device signed it, "
            f"found: {found}",
        ) from error
    try:
        values = json.loads(text)
        evaluation = values.pop("evaluation")
        return Statement(**values, evaluation=evaluation and Evaluation(**evaluation))
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # by another version of us
        raise Refused(
            Reason.PLAN_MISMATCH,
            f"expected {STATEMENT_FILE} of version {folder.name} in this version's form",
        ) from error
