"""Tasks of plans: what is written is read, and what no graph could satisfy is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import Reason, Refused
from fedloom.graph_contracts import (
    Port,
    eval_contract,
    gen_contract,
    infer_contract,
    train_contract,
    train_dp_contract,
)
from fedloom.tasks import (
    ArrayInput,
    ArrayLearning,
    CausalLanguageModelling,
    Task,
    TextClassification,
    TokenClassification,
    fill_template,
    read_task,
    write_task,
)
from fedloom.v1 import plan_pb2

labels = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5, unique=True).map(tuple)
tokens = st.integers(2, 4096)
names = st.from_regex(r"\A(x|features|image_[0-9])\Z")
inputs = st.lists(
    st.builds(ArrayInput, names, st.lists(st.integers(1, 9), max_size=3).map(tuple)),
    min_size=1,
    max_size=3,
    unique_by=lambda entry: entry.name,
).map(tuple)
tasks: st.SearchStrategy[Task] = st.one_of(
    st.builds(TextClassification, labels, tokens, st.integers(0, 9)),
    st.builds(TokenClassification, labels, tokens, st.integers(0, 9)),
    st.builds(
        CausalLanguageModelling,
        max_tokens=tokens,
        pad_token_id=st.integers(0, 9),
        vocabulary_size=st.integers(10, 99),
        layers=st.integers(1, 3),
        heads=st.integers(1, 3),
        head_size=st.integers(1, 8),
        prompt=st.sampled_from(("", "Q: {question}\nA:")),
        answer=st.sampled_from(("{text}", " {answer} {more}")),
        stop_token_ids=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    ),
    st.builds(ArrayLearning, inputs, labels),
    st.builds(ArrayLearning, inputs, values=st.integers(1, 5)),
)


@given(tasks)
def test_what_is_written_is_read(task: Task) -> None:
    message = plan_pb2.Plan()
    write_task(task, message)
    assert read_task(plan_pb2.Plan.FromString(message.SerializeToString())) == task


@given(tasks, st.integers(1, 9))
def test_graphs_of_one_plan_agree_on_what_they_share(task: Task, parameters: int) -> None:
    train = train_contract(task, parameters)
    private = train_dp_contract(task, parameters)
    evaluation, inference = eval_contract(task, parameters), infer_contract(task, parameters)
    assert {**private.inputs} == {**train.inputs, "clip": Port("tensor(float)", ())}
    assert evaluation.inputs == train.inputs
    assert inference.inputs.items() < train.inputs.items()
    assert set(train.inputs) - set(inference.inputs) == {"labels", "sample_weight"}
    assert inference.outputs.items() < evaluation.outputs.items()


def test_a_cache_has_a_key_and_a_value_in_each_layer() -> None:
    task = CausalLanguageModelling(8, 0, 50, layers=2, heads=3, head_size=4)
    contract = gen_contract(task, 7)
    assert [name for name in contract.inputs if name.startswith("past.")] == [
        "past.0.key",
        "past.0.value",
        "past.1.key",
        "past.1.value",
    ]
    assert contract.inputs["past.1.key"].axes == ("batch", 3, "past", 4)
    assert contract.outputs["present.1.value"].axes == ("batch", 3, "past + sequence", 4)
    assert contract.outputs["logits"].axes == ("batch", 50)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TextClassification(("one",), 8, 0),
        lambda: TokenClassification(("one", "one"), 8, 0),
        lambda: TextClassification(("one", ""), 8, 0),
        lambda: TextClassification(("one", "two"), 1, 0),
        lambda: CausalLanguageModelling(8, 50, 50, 1, 1, 1),
        lambda: CausalLanguageModelling(8, 0, 50, 0, 1, 1),
        lambda: CausalLanguageModelling(8, 0, 50, 1, 1, 1, answer="no column"),
        lambda: CausalLanguageModelling(8, 0, 50, 1, 1, 1, stop_token_ids=(50,)),
        lambda: ArrayInput("theta", (2,)),
        lambda: ArrayInput("Features", (2,)),
        lambda: ArrayInput("x", (0,)),
        lambda: ArrayInput("x", (2**13, 2**13)),
        lambda: ArrayLearning((), ("no", "yes")),
        lambda: ArrayLearning((ArrayInput("x", ()), ArrayInput("x", ())), ("no", "yes")),
        lambda: ArrayLearning((ArrayInput("x", ()),), ("no", "yes"), values=1),
        lambda: ArrayLearning((ArrayInput("x", ()),)),
    ],
)
def test_what_no_graph_could_satisfy_is_refused(make) -> None:
    with pytest.raises(Refused) as refusal:
        make()
    assert refusal.value.reason is Reason.MALFORMED


def test_a_plan_without_a_known_task_is_refused() -> None:
    with pytest.raises(Refused) as refusal:
        read_task(plan_pb2.Plan())
    assert refusal.value.reason is Reason.PLAN_UNSUPPORTED


def test_templates_leave_other_braces_alone() -> None:
    row = {"question": "why {answer}?", "answer": "so"}
    assert fill_template("{question} { } {{answer}} {-}", row) == "why {answer}? { } {so} {-}"
