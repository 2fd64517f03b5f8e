"""What an agent would refuse, `plan verify` and `plan show` refuse too; options have their task."""

import json
import shutil

import onnx
import pytest
from typer.testing import CliRunner

from coordinator.commands.plans import plan_app
from coordinator.plans import verify_plan
from fedloom.adapters import write_adapter
from fedloom.errors import ConfigError, Refused
from fedloom.graph_contracts import INFER_GRAPH
from fedloom.plans import ADAPTER_FILE, PLAN_FILE, Plan, Role


def invoke(*arguments: object):
    return CliRunner().invoke(plan_app, [str(argument) for argument in arguments])


@pytest.fixture
def copy(small, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(small.folder, folder)
    return folder


def pin_again(folder, plan: Plan) -> None:
    """Make the hashes fit what is there, as a careless or a hostile builder would."""
    import dataclasses

    from coordinator.plans.files import member

    members = tuple(member(folder, entry.name) for entry in plan.members)
    (folder / PLAN_FILE).write_bytes(dataclasses.replace(plan, members=members).encode())


def test_a_sound_folder(small):
    assert verify_plan(small.folder).plan == small.plan
    answer = json.loads(invoke("verify", small.folder, "--json").stdout)
    assert answer["graphs"] == ["train.onnx", "eval.onnx", "infer.onnx"]
    shown = json.loads(invoke("show", small.folder, "--json").stdout)
    assert shown["task"] == "text_classification"
    sizes = {
        role.name.lower(): sum(t.size for t in small.plan.layout if t.role is role)
        for role in (Role.LORA_A, Role.LORA_B, Role.HEAD)
    }
    assert shown["layout"] == sizes
    assert sum(sizes.values()) == shown["parameters"]


def test_the_layout_is_listed(small):
    listed = json.loads(invoke("show", small.folder, "--layout", "--json").stdout)
    assert [entry[0] for entry in listed] == [tensor.name for tensor in small.plan.layout]
    text = invoke("show", small.folder, "--layout").stdout
    assert all(tensor.name in text for tensor in small.plan.layout)


@pytest.mark.parametrize("command", ["verify", "show"])
def test_a_changed_file(small, copy, command):
    path = copy / INFER_GRAPH
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    result = invoke(command, copy)
    assert isinstance(result.exception, Refused)
    assert "infer.onnx" in str(result.exception)


def test_an_adapter_of_another_layout(small, copy, any_theta):
    head = [tensor for tensor in small.plan.layout if tensor.role is Role.HEAD]
    import dataclasses

    first = dataclasses.replace(head[0], offset=0)
    write_adapter(copy / ADAPTER_FILE, (first,), any_theta(small.plan, 1)[: first.size])
    pin_again(copy, small.plan)
    with pytest.raises(Refused, match=r"adapter_model\.safetensors with this plan's header"):
        verify_plan(copy)


def test_a_graph_that_breaks_its_contract(small, copy):
    model = onnx.load(copy / INFER_GRAPH, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    model.graph.output[0].name = "scores"
    (copy / INFER_GRAPH).write_bytes(model.SerializeToString())
    pin_again(copy, small.plan)
    with pytest.raises(Refused, match=r"infer\.onnx with output logits"):
        verify_plan(copy)


@pytest.mark.parametrize(
    ("task", "option", "where"),
    [
        ("causal-lm", ("--labels", "absent.json"), "labels"),
        ("module", ("--rank", 8), "rank"),
        ("module", ("--freeze-a",), "freeze_a"),
        ("module", ("--max-tokens", 9), "max_tokens"),
        ("ner", ("--prompt", "{text}"), "prompt"),
        ("classification", ("--answer", "{text}"), "answer"),
    ],
)
def test_options_of_another_task(tmp_path, task, option, where):
    arguments = ("build", "--model", "m", "--out", tmp_path / "plan", "--task", task)
    caught = invoke(*arguments, *option).exception
    assert isinstance(caught, ConfigError)
    assert caught.where == where
    assert f"expected none for the task {task}" in str(caught)


def test_an_unknown_task(tmp_path):
    caught = invoke("build", "--model", "m", "--out", tmp_path / "p", "--task", "vision").exception
    assert isinstance(caught, ConfigError)
    assert "classification, ner, causal-lm, module" in str(caught)
