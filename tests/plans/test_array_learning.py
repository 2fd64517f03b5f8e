"""Plans for any module on arrays train as torch does."""

import numpy as np
import pytest

from coordinator.plans import PlanRequest, build_plan, verify_plan
from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError
from fedloom.graph_contracts import EVAL_GRAPH, INFER_GRAPH, TRAIN_GRAPH
from fedloom.plans import ADAPTER_FILE, BASE_FILE, Role
from fedloom.tasks import ArrayInput
from tests.plans import networks

STEPS, LEARNING_RATE = 20, 0.1


@pytest.fixture(scope="module", params=["mlp", "cnn"])
def built(request, tmp_path_factory):
    """A plan, its folder, and a module like the one that it was made from."""
    folder = tmp_path_factory.mktemp("modules") / request.param
    made = PlanRequest(model=f"tests.plans.networks:{request.param}", task="module")
    plan = build_plan(made, folder, lambda line: None, None)
    return plan, folder, getattr(networks, request.param)()


def random_rows(plan, rows: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    inputs = {
        entry.name: random.standard_normal((rows, *entry.shape), np.float32)
        for entry in plan.task.inputs
    }
    labels = (
        random.standard_normal((rows, plan.task.values), np.float32)
        if plan.task.values
        else random.integers(0, len(plan.task.labels), rows)
    )
    return {**inputs, "labels": labels, "sample_weight": np.ones(rows, np.float32)}


def same_values(module, plan, folder):
    """Give a module the plan's values, frozen ones included; return what is trained."""
    import torch
    from safetensors.torch import load_file

    state = load_file(folder / ADAPTER_FILE)
    if (folder / BASE_FILE).is_file():
        state |= load_file(folder / BASE_FILE)
    module.network.load_state_dict(state, strict=False)
    module.network.eval()
    parameters = dict(module.network.named_parameters())
    trained = [parameters[tensor.name] for tensor in plan.layout]
    assert all(p.requires_grad for p in trained)
    assert sum(p.requires_grad for p in parameters.values()) == len(trained)
    return trained, torch.optim.SGD(trained, lr=LEARNING_RATE)


def test_twenty_steps_equal_torch(built, open_graph):
    import torch

    plan, folder, module = built
    parameters, oracle = same_values(module, plan, folder)
    session = open_graph(folder / TRAIN_GRAPH)
    theta = read_adapter(folder / ADAPTER_FILE, plan.layout)
    for step in range(STEPS):
        batch = random_rows(plan, 1 + step % 5, seed=step)
        inputs = [torch.from_numpy(batch[entry.name]) for entry in plan.task.inputs]
        oracle.zero_grad()
        logits = module.network(*inputs)
        loss = module.loss(logits, torch.from_numpy(batch["labels"])).mean()
        loss.backward()
        oracle.step()
        loss_sum, weight, correct, gradient = session.run(None, {"theta": theta, **batch})
        assert loss_sum / weight == pytest.approx(loss.item(), rel=1e-4)
        if plan.task.labels:
            assert correct == (logits.argmax(-1).numpy() == batch["labels"]).sum()
        else:
            assert correct == 0
        theta -= np.float32(LEARNING_RATE) * gradient / weight
    expected = np.concatenate([p.detach().numpy().ravel() for p in parameters])
    assert np.linalg.norm(theta - expected) <= 1e-4 * np.linalg.norm(expected)


def test_what_is_in_the_plan(built):
    plan, folder, module = built
    assert verify_plan(folder).graphs == (TRAIN_GRAPH, EVAL_GRAPH, INFER_GRAPH)
    inputs = tuple(ArrayInput(name, shape) for name, shape in module.inputs.items())
    assert plan.task.inputs == inputs
    heads = [tensor.name for tensor in plan.layout if tensor.role is Role.HEAD]
    assert heads == [f"{module.head}.weight", f"{module.head}.bias"]
    assert {member.name for member in plan.members} == {
        TRAIN_GRAPH,
        EVAL_GRAPH,
        INFER_GRAPH,
        ADAPTER_FILE,
        BASE_FILE,
    }


@pytest.mark.parametrize(
    ("factory", "problem"),
    [
        ("tests.plans.networks:absent", "a module that Python can import"),
        ("tests.plans.absent:mlp", "a module that Python can import"),
        ("no factory", "a module that Python can import"),
        ("tests.plans.networks:nothing", "return a .*TrainableModule, found NoneType"),
        ("tests.plans.networks:unused", "found extra, which does not"),
        ("tests.plans.networks:one_loss", r"one loss for each row of shape \(3,\)"),
        ("tests.plans.networks:wrong_width", r"logits of shape \(3, 2\).*found \(3, 4\)"),
    ],
)
def test_what_does_not_fit_is_said(factory, problem, tmp_path):
    request = PlanRequest(model=factory, task="module")
    with pytest.raises(ConfigError, match=problem):
        build_plan(request, tmp_path / "plan", lambda line: None, None)
    assert not list(tmp_path.iterdir())
