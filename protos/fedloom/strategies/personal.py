"""What of the model may be a device's own, in words; the papers' files have the arithmetic."""

from dataclasses import dataclass, field

from fedloom.terms import Personal


@dataclass(frozen=True)
class PersonalRule:
    """A choice as a run file names it; `least` has the keys that it needs, with usual values."""

    personal: Personal
    name: str
    paper: str
    own: str
    trained: str
    least: dict[str, float] = field(default_factory=dict)


_ALL = (
    PersonalRule(Personal.NONE, "one model for all", "", "", ""),
    PersonalRule(Personal.FEDPER, "FedPer", "arXiv:1912.00818", "the head", "with everything else"),
    PersonalRule(
        Personal.FEDREP,
        "FedRep",
        "arXiv:2102.07078",
        "the head",
        "alone, in the first steps of a round",
        {"head_steps": 1},
    ),
    PersonalRule(
        Personal.DITTO,
        "Ditto",
        "arXiv:2012.04221",
        "a second model",
        "beside the update, drawn to the global model: twice the steps",
        {"personal_lambda": 0.1},
    ),
)
RULES: dict[Personal, PersonalRule] = {rule.personal: rule for rule in _ALL}
