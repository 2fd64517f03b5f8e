"""A plan is either read exactly as it was written, or refused with a reason."""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import Reason, Refused
from fedloom.plans import (
    ADAPTER_FILE,
    MAX_MEMBERS,
    MAX_PARAMETERS,
    MAX_PLAN_BYTES,
    PLAN_FILE,
    BaseStorage,
    Plan,
    PlanMember,
    PlanOrigin,
    TrainableTensor,
    TrainingMemory,
    load_plan,
    parse_plan,
    verify_members,
)
from fedloom.tasks import MAX_LABELS, TextClassification
from fedloom.v1 import plan_pb2

DIGEST = hashlib.sha256(b"").digest()

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_member_names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", fullmatch=True).filter(
    lambda name: name != PLAN_FILE
)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[TrainableTensor, ...]:
    """Contiguous layouts of up to six tensors."""
    names = draw(
        st.lists(
            _text.filter(lambda name: name != "__metadata__"), min_size=1, max_size=6, unique=True
        )
    )
    shapes = st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple)
    layout: list[TrainableTensor] = []
    offset = 0
    for name in names:
        layout.append(TrainableTensor(name, draw(shapes), offset))
        offset += layout[-1].size
    return tuple(layout)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any plan within the limits, small."""
    names = sorted(draw(st.lists(_member_names, max_size=5, unique=True)))
    digests = st.binary(min_size=32, max_size=32)
    labels = draw(st.lists(_text.filter(bool), min_size=2, max_size=6, unique=True))
    return Plan(
        name=draw(_text),
        members=tuple(PlanMember(n, draw(st.integers(0, 2**64 - 1)), draw(digests)) for n in names),
        layout=draw(layouts()),
        task=TextClassification(
            tuple(labels), draw(st.integers(2, 512)), draw(st.integers(0, 2**32 - 1))
        ),
        origin=PlanOrigin(
            draw(_text),
            draw(st.integers(0, 256)),
            draw(st.floats(0, 64)),
            tuple(draw(st.lists(_text, max_size=3))),
        ),
        base_storage=draw(st.sampled_from(BaseStorage)),
        training_memory=draw(st.none() | st.builds(TrainingMemory, *[st.integers(0, 2**48)] * 4)),
    )


def refusal_of(data: bytes) -> Reason | None:
    """Return why the bytes are refused, None when they are read; any other error passes."""
    try:
        parse_plan(data)
    except Refused as refused:
        return refused.reason
    return None


@given(plans())
def test_a_plan_is_read_as_it_was_written(plan: Plan) -> None:
    data = plan.encode()
    assert parse_plan(data) == plan
    assert plan.encode() == data
    assert plan.parameter_count == sum(math.prod(tensor.shape) for tensor in plan.layout)


@given(plans(), st.data())
def test_a_cut_or_altered_plan_is_read_or_refused_and_nothing_else(
    plan: Plan, data: st.DataObject
) -> None:
    altered = bytearray(plan.encode())
    position = data.draw(st.integers(0, len(altered) - 1))
    altered[position] ^= data.draw(st.integers(1, 255))
    for candidate in (bytes(altered), bytes(altered[:position])):
        assert refusal_of(candidate) in (None, Reason.MALFORMED, Reason.PLAN_UNSUPPORTED)


@given(plans())
def test_a_storage_of_a_later_version_is_refused(plan: Plan) -> None:
    message = plan_pb2.Plan.FromString(plan.encode())
    message.base_storage = 77  # type: ignore[assignment] # open enums take any number
    assert refusal_of(message.SerializeToString()) is Reason.PLAN_UNSUPPORTED


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    assert refusal_of(data) in (None, Reason.MALFORMED, Reason.PLAN_UNSUPPORTED)


def good_message() -> plan_pb2.Plan:
    """A plan of two tensors (6 and 4 values) and two members, as protobuf."""
    return plan_pb2.Plan(
        format=1,
        name="example",
        members=[
            plan_pb2.PlanMember(name="infer.onnx", size_bytes=0, sha256=DIGEST),
            plan_pb2.PlanMember(name="train.onnx", size_bytes=0, sha256=DIGEST),
        ],
        parameter_count=10,
        layout=[
            plan_pb2.TrainableTensor(name="a", shape=[2, 3], offset=0),
            plan_pb2.TrainableTensor(name="b", shape=[4], offset=6),
        ],
        text_classification=plan_pb2.TextClassification(labels=["no", "yes"], max_tokens=8),
    )


def test_the_example_that_the_refusals_start_from_is_accepted() -> None:
    plan = parse_plan(good_message().SerializeToString())
    assert plan.parameter_count == 10
    assert plan.member("train.onnx").sha256 == DIGEST
    with pytest.raises(Refused, match=r"PLAN_UNSUPPORTED: .*tokenizer\.json"):
        plan.member("tokenizer.json")


Change = Callable[[plan_pb2.Plan], object]  # alters the example in place
MALFORMED: dict[str, tuple[Change, str]] = {
    "long name": (lambda p: setattr(p, "name", "n" * 129), "128 characters"),
    "path-like member": (lambda p: setattr(p.members[0], "name", "../x"), "plain file name"),
    "absolute member": (lambda p: setattr(p.members[0], "name", "/etc/x"), "plain file name"),
    "hidden member": (lambda p: setattr(p.members[0], "name", ".."), "plain file name"),
    "option-like member": (lambda p: setattr(p.members[0], "name", "-rf"), "plain file name"),
    "line break in member": (lambda p: setattr(p.members[0], "name", "a\n"), "plain file name"),
    "long member": (lambda p: setattr(p.members[0], "name", "a" * 65), "plain file name"),
    "empty member": (lambda p: setattr(p.members[0], "name", ""), "plain file name"),
    "the plan as its own member": (
        lambda p: p.members[0].MergeFrom(plan_pb2.PlanMember(name=PLAN_FILE)),
        "plain file name",
    ),
    "duplicate members": (lambda p: setattr(p.members[0], "name", "train.onnx"), "distinct"),
    "unsorted members": (lambda p: p.members.reverse(), "ascending"),
    "too many members": (
        lambda p: p.members.extend(p.members[:1] * MAX_MEMBERS),
        f"at most {MAX_MEMBERS} members",
    ),
    "short digest": (lambda p: setattr(p.members[0], "sha256", DIGEST[:31]), "32 bytes, found 31"),
    "long digest": (lambda p: setattr(p.members[0], "sha256", DIGEST + b"\0"), "found 33"),
    "no tensor": (lambda p: p.ClearField("layout"), "at least one trainable tensor"),
    "layout gap": (lambda p: setattr(p.layout[1], "offset", 7), "b at offset 6, found 7"),
    "layout overlap": (lambda p: setattr(p.layout[1], "offset", 5), "b at offset 6, found 5"),
    "layout starts late": (lambda p: setattr(p.layout[0], "offset", 1), "a at offset 0, found 1"),
    "layout reversed": (lambda p: p.layout.reverse(), "offset 0, found 6"),
    "zero extent": (lambda p: p.layout[0].shape.append(0), "positive extents"),
    "negative extent": (lambda p: p.layout[0].shape.append(-2), "positive extents"),
    "no extent": (lambda p: p.layout[0].ClearField("shape"), "positive extents"),
    "huge extent": (lambda p: p.layout[1].shape.append(2**63 - 1), "positive extents"),
    "huge product": (
        lambda p: p.layout[1].shape.extend([MAX_PARAMETERS] * 3),
        f"at most {MAX_PARAMETERS} parameters",
    ),
    "too many axes": (lambda p: p.layout[1].shape.extend([1] * 32), "at most 32 axes, found 33"),
    "tensor twice": (lambda p: setattr(p.layout[1], "name", "a"), "distinct tensor names"),
    "reserved tensor name": (lambda p: setattr(p.layout[1], "name", "__metadata__"), "own name"),
    "wrong parameter_count": (lambda p: setattr(p, "parameter_count", 11), "10 .*found 11"),
    "no parameter_count": (lambda p: p.ClearField("parameter_count"), "10 .*found 0"),
    "one label": (lambda p: p.text_classification.labels.pop(), "labels, found 1"),
    "empty label": (
        lambda p: p.text_classification.labels.append(""),
        "labels that are not empty",
    ),
    "label twice": (lambda p: p.text_classification.labels.append("no"), "distinct labels"),
    "too many labels": (
        lambda p: p.text_classification.labels.extend(map(str, range(MAX_LABELS))),
        f"found {MAX_LABELS + 2}",
    ),
    "no tokens": (lambda p: setattr(p.text_classification, "max_tokens", 1), "found 1"),
    "too many tokens": (
        lambda p: setattr(p.text_classification, "max_tokens", 131_073),
        "found 131073",
    ),
}


@pytest.mark.parametrize(("change", "words"), MALFORMED.values(), ids=MALFORMED)
def test_a_plan_outside_the_limits_is_malformed(change: Change, words: str) -> None:
    message = good_message()
    change(message)
    with pytest.raises(Refused, match=words) as caught:
        parse_plan(message.SerializeToString())
    assert caught.value.reason is Reason.MALFORMED


def test_a_shape_made_to_cost_time_is_refused_at_once() -> None:
    message = good_message()
    message.layout[0].shape.extend([MAX_PARAMETERS] * 800_000)  # 4 MB; the product has 25 Mbit
    data = message.SerializeToString()
    assert len(data) < MAX_PLAN_BYTES
    start = time.perf_counter()
    with pytest.raises(Refused, match="axes"):
        parse_plan(data)
    assert time.perf_counter() - start < 5  # seconds; multiplying it out takes minutes


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p, "format", 2),
        lambda p: p.ClearField("format"),
        lambda p: p.ClearField("text_classification"),
    ],
    ids=["newer format", "no format", "no task"],
)
def test_a_plan_for_another_engine_is_unsupported(change: Change) -> None:
    message = good_message()
    change(message)
    with pytest.raises(Refused) as caught:
        parse_plan(message.SerializeToString())
    assert caught.value.reason is Reason.PLAN_UNSUPPORTED


def test_garbage_and_oversize_are_malformed() -> None:
    with pytest.raises(Refused, match="other bytes") as caught:
        parse_plan(b"\xff" * 64)
    assert caught.value.reason is Reason.MALFORMED
    with pytest.raises(Refused, match=f"found {MAX_PLAN_BYTES + 1}") as caught:
        parse_plan(good_message().SerializeToString().ljust(MAX_PLAN_BYTES + 1, b"\0"))
    assert caught.value.reason is Reason.MALFORMED


def test_a_plan_is_validated_when_it_is_made_too() -> None:
    plan = parse_plan(good_message().SerializeToString())
    with pytest.raises(Refused, match="offset 0"):
        replace(plan, layout=plan.layout[::-1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plan folder with two members."""
    contents = {ADAPTER_FILE: b"adapter", "train.onnx": bytes(range(256))}
    plan = replace(
        parse_plan(good_message().SerializeToString()),
        members=tuple(
            PlanMember(name, len(data), hashlib.sha256(data).digest())
            for name, data in contents.items()
        ),
    )
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / PLAN_FILE).write_bytes(plan.encode())
    return tmp_path


def test_members_that_are_what_the_plan_says_pass(folder: Path) -> None:
    verify_members(load_plan(folder), folder)


def _missing(path: Path) -> None:
    path.unlink()


def _short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _long(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _tampered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_missing, _short, _long, _tampered, _folder])
@pytest.mark.parametrize("name", [ADAPTER_FILE, "train.onnx"])
def test_a_damaged_member_is_named(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    plan = load_plan(folder)
    damage(folder / name)
    with pytest.raises(Refused, match=name) as caught:
        verify_members(plan, folder)
    assert caught.value.reason is Reason.PLAN_MISMATCH


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        load_plan(tmp_path)
    assert caught.value.reason is Reason.PLAN_MISMATCH
