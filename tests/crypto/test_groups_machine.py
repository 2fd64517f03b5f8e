"""The orderings of `test_cohort_machine`, of cohorts with a sum for each of two groups."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from crypto.cohort import Cohort, MemberPolicy, MemberTools, quorum, tolerated

from .cohorts import Device, attempt_of, sign_as, verify
from .test_cohort_machine import LyingCoordinator

GROUPS = 2


class LyingToGroups(LyingCoordinator):
    """It opens a group's sum where it knows every mask in that group's uploads."""

    honest = ("h0", "h1", "h2", "h3", "h4", "h5", "h6", "h7")

    @initialize()
    def start(self):
        super().start()
        for name in self.honest:
            self.devices[name] = Device(name)
            self.devices[name].tools = MemberTools(sign_as(name), verify, MemberPolicy(3, GROUPS))

    def form(self, attempt, names, audience):
        if len(names) < GROUPS:
            return None
        members = tuple(self.advertised[attempt][name] for name in sorted(names))
        cohort = Cohort(attempt, 3, members, GROUPS)
        for group in self.groups(cohort):
            colluders = [s for s in group if members[s].agent_id in self.corrupt]
            if len(colluders) > tolerated(len(group)):
                return None  # more colluders than the claim allows
        self.cohorts[cohort.digest] = cohort
        for name in sorted(names & set(audience)):
            self.say(name, cohort)
        return cohort

    @rule(data=st.data(), attempt=st.integers(1, 4))
    def open_what_some_leave(self, data, attempt):
        """An attempt as it should be, certified by as few as may be: the others try the next."""
        identifier = attempt_of(1, attempt)
        self.gather(identifier, set(self.honest))
        names = set(self.advertised[identifier])
        if len(names) < 3 * GROUPS or (cohort := self.form(identifier, names, self.honest)) is None:
            return
        self.pass_boxes_on(cohort, set(self.honest))
        few = data.draw(st.sets(st.sampled_from(self.honest), min_size=3))
        acceptance = self.accept(cohort, set(), few)
        self.certify(acceptance, set(), set(self.honest))

    def groups(self, cohort):
        """Return the slots of each group."""
        return [
            [slot for slot, found in enumerate(cohort.group_of) if found == group]
            for group in range(GROUPS)
        ]

    def opened_groups(self, cohort):
        """Yield the members of each group whose sum it opens: all, honest, in the sum."""
        for group in self.groups(cohort):
            honest = [slot for slot in group if slot in self.honest_slots(cohort)]
            seeds = {slot for slot in honest if self.has(cohort, slot, "seed")}
            stripped = {slot for slot in honest if self.has(cohort, slot, "mask key")}
            if seeds and seeds | stripped == set(honest):
                yield group, honest, seeds

    @invariant()
    def every_opened_sum_has_enough_honest_members(self):
        for cohort in self.cohorts.values():
            for group, honest, seeds in self.opened_groups(cohort):
                c = len(group) - len(honest)
                assert len(seeds) >= max(2, quorum(len(group)) - c)

    def opened_sums(self, number):
        for cohort in self.cohorts.values():
            if cohort.attempt.round == number:
                for _, _, seeds in self.opened_groups(cohort):
                    names = {cohort.members[slot].agent_id for slot in seeds}
                    yield [float(name in names) for name in self.honest]


TestLyingToGroups = LyingToGroups.TestCase
TestLyingToGroups.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_the_lying_coordinator_does_open_groups():
    """The rules above reach what they are about."""
    machine = LyingToGroups()
    machine.start()
    everyone, attempt = set(machine.honest), attempt_of()
    machine.gather(attempt, everyone)
    cohort = machine.form(attempt, everyone, everyone)
    machine.pass_boxes_on(cohort, everyone)
    machine.certify(machine.accept(cohort, set(), everyone), set(), everyone)
    assert len(list(machine.opened_sums(1))) == GROUPS
    machine.every_opened_sum_has_enough_honest_members()
    machine.no_combination_of_a_rounds_sums_shows_one_update()


class WithTenDevices(LyingToGroups):
    honest = tuple(f"h{number}" for number in range(10))


def test_a_group_is_not_opened_without_a_quorum_of_its_own():
    """Five of seven would do for one sum. Of a group of three only r vouches; a and b go on to a
    group with a colluder in the next attempt: the difference of the two sums would be r's update.
    """
    machine = WithTenDevices()
    machine.start()
    everyone, first = set(machine.honest), attempt_of()
    seven = {f"h{number}" for number in range(7)}
    machine.gather(first, seven)
    cohort = machine.form(first, seven, everyone)
    [three] = [group for group in machine.groups(cohort) if len(group) == 3]
    _, a, b = (cohort.members[slot].agent_id for slot in three)
    machine.pass_boxes_on(cohort, everyone)
    acceptance = machine.accept(cohort, set(), everyone - {a, b})
    assert len(machine.vouched[acceptance.digest]) == quorum(7)
    machine.certify(acceptance, set(), everyone)
    assert not list(machine.opened_sums(1))
    names = {a, b, "h7", "h8", "h9"}
    for attempt in (attempt_of(attempt=number) for number in range(2, 200)):
        machine.gather(attempt, names)
        again = machine.form(attempt, names | {"c0"}, everyone)
        together = [{again.members[s].agent_id for s in group} for group in machine.groups(again)]
        if {a, b, "c0"} in together:
            break
    machine.pass_boxes_on(again, everyone)
    machine.certify(machine.accept(again, set(), everyone), set(), everyone)
    assert len(list(machine.opened_sums(1))) == GROUPS  # a + b, and the others
    machine.every_opened_sum_has_enough_honest_members()
    machine.no_combination_of_a_rounds_sums_shows_one_update()
