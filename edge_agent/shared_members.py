"""Files that plans of this device have in common: fetched once, kept once.

    plans/<SHA-256 of plan.binpb>/base.safetensors     one file under two names, where two plans
    plans/<SHA-256 of plan.binpb>/base.safetensors     name a member with the same SHA-256

ONNX Runtime maps the base into memory, so that sessions of both plans share its pages too; all
but the matrices of a language model that generates, of which its session keeps copies (`prepack`).
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import structlog

from fedloom.artifacts import ArtifactReference, reference_of
from fedloom.errors import Refused
from fedloom.plans import PLAN_FILE, Plan, parse_plan

_log = structlog.get_logger()


def link_known_members(plan: Plan, folder: Path) -> None:
    """Give a second name in `folder` to each member that another plan beside it has, whole.

    Links alone: what a file system cannot link is fetched again, after the room for it was found.
    """
    missing = {
        ArtifactReference(member.sha256, member.size_bytes): member.name
        for member in plan.members
        if not (folder / member.name).exists()
    }
    for reference, path in _members_beside(folder):
        name = missing.get(reference)
        if name is None or reference_of(path) != reference:
            continue
        with suppress(OSError):  # another device, or a file system without hard links
            _link(path, folder / name)
            del missing[reference]
            _log.info("plan member shared", member=name, size_bytes=reference.size_bytes)


def _members_beside(folder: Path) -> Iterator[tuple[ArtifactReference, Path]]:
    for said in sorted(folder.parent.glob(f"*/{PLAN_FILE}")):
        if said.parent == folder:
            continue
        with suppress(Refused, OSError):  # not finished, or kept by another version
            for member in parse_plan(said.read_bytes()).members:
                path = said.parent / member.name
                yield ArtifactReference(member.sha256, member.size_bytes), path


def _link(source: Path, target: Path) -> None:
    """Link under another name first: a file that has appeared meanwhile is replaced."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    os.link(source, partial)
    partial.replace(target)
