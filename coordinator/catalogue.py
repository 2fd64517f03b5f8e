"""The plans that this coordinator has."""

import hashlib
from dataclasses import replace

from coordinator.published import Published
from coordinator.store import Store
from coordinator.summaries import Page, PlanPart, PlanSummary, page
from fedloom.artifacts import ArtifactReference
from fedloom.errors import Reason, Refused
from fedloom.plans import Plan, Role
from fedloom.tasks import task_name

SHORTEST_PREFIX = 4


class Catalogue:
    """Plans of the coordinator's runs, as published."""

    def __init__(self, store: Store, published: Published) -> None:
        self._store = store
        self._published = published

    def list(self, size: int, token: str) -> Page[PlanSummary]:
        """List the plans of this coordinator's runs, newest first."""
        references = {run.plan.sha256: run.plan for run in self._store.runs()}
        newest = reversed(references.values())
        cut = page(newest, lambda plan: plan.sha256.hex(), size, token)
        return Page(tuple(self._summary(plan) for plan in cut.items), cut.next_token)

    def verified(self, prefix: str) -> PlanSummary:
        """Compare a plan's files with their hashes and return what is in it."""
        reference = self._reference(prefix)
        if reference is None:
            raise Refused(Reason.NOT_FOUND, f"expected the id of one plan, found {prefix[:64]!r}")
        return self._summary(reference, verify=True)

    def _summary(self, reference: ArtifactReference, verify: bool = False) -> PlanSummary:
        runs = sum(run.plan.sha256 == reference.sha256 for run in self._store.runs())
        plan = self.read(reference)
        if plan is None:
            return PlanSummary(reference.sha256, runs=runs, damage="plan.binpb cannot be read")
        return replace(facts_of(plan), runs=runs, damage=self._damage(plan, verify))

    def _damage(self, plan: Plan, verify: bool) -> str:
        for member in plan.members:
            if self._published.size(member.sha256) is None:
                return f"{member.name} is missing"
            if verify and not self._is_right(member.sha256):
                return f"{member.name} is not what its SHA-256 says"
        return ""

    def _is_right(self, sha256: bytes) -> bool:
        digest = hashlib.sha256()
        for part in self._published.parts(sha256):
            digest.update(part)
        return digest.digest() == sha256

    def known(self, prefix: str) -> Plan | None:
        """Return the one plan whose id starts so, if its files are here."""
        reference = self._reference(prefix)
        plan = None if reference is None else self.read(reference)
        return plan if plan is not None and not self._damage(plan, verify=False) else None

    def _reference(self, prefix: str) -> ArtifactReference | None:
        plans = {run.plan for run in self._store.runs()}
        found = [plan for plan in plans if plan.sha256.hex().startswith(prefix)]
        return found[0] if len(found) == 1 and len(prefix) >= SHORTEST_PREFIX else None

    def read(self, reference: ArtifactReference) -> Plan | None:
        """Return a published plan; None where it is missing or damaged."""
        try:
            return self._published.read_plan(reference)
        except Refused:
            return None


def facts_of(plan: Plan) -> PlanSummary:
    """Return what is in a plan; its files are not looked at."""
    return PlanSummary(
        hashlib.sha256(plan.encode()).digest(),
        plan.name,
        plan.origin.base_model,
        plan.parameter_count,
        len(getattr(plan.task, "labels", ())),
        getattr(plan.task, "max_tokens", 0),
        tuple((member.name, member.size_bytes) for member in plan.members),
        task=task_name(plan.task),
        parts=_parts(plan),
    )


def _parts(plan: Plan) -> tuple[PlanPart, ...]:
    found = []
    for role in Role:
        sizes = [tensor.size for tensor in plan.layout if tensor.role is role]
        if sizes:
            found.append(PlanPart(role.name.lower(), len(sizes), sum(sizes)))
    return tuple(found)
