"""What agents may download: plans, their members and sums, each a file named by its SHA-256."""

import os
from collections.abc import Iterator
from pathlib import Path

from fedloom.artifacts import ArtifactReference, write_artifact
from fedloom.exports import link_or_copy
from fedloom.plans import PLAN_FILE, Plan, load_plan, verify_members


class Published:
    """A folder of published artifacts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: bytes) -> Path:
        """Return where the artifact lies."""
        return self.folder / sha256.hex()

    def put(self, parts: Iterator[bytes]) -> ArtifactReference:
        """Publish bytes as they come; they show under their name only when they are whole."""
        partial = self.folder / f"{os.urandom(8).hex()}.part"
        try:
            reference = write_artifact(partial, parts)
            partial.replace(self.path(reference.sha256))
        finally:
            partial.unlink(missing_ok=True)
        return reference

    def put_plan(self, folder: Path) -> tuple[Plan, ArtifactReference]:
        """Publish a plan and its members, after comparing each with its hash."""
        plan = load_plan(folder)
        verify_members(plan, folder)
        for member in plan.members:
            destination = self.path(member.sha256)
            if not destination.exists():
                partial = destination.with_suffix(".part")
                partial.unlink(missing_ok=True)
                link_or_copy(folder / member.name, partial)
                partial.replace(destination)
        return plan, self.put(iter([(folder / PLAN_FILE).read_bytes()]))

    def has_plan(self, plan: Plan) -> bool:
        """Whether every member is still here."""
        return all(self.path(member.sha256).is_file() for member in plan.members)
