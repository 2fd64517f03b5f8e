"""Operators over their service: locally, from elsewhere, where nobody serves; and nobody else."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from coordinator.admin_client import AdminClient, NotStarted, Unreachable
from coordinator.admin_socket import SOCKET_FILE, find_socket
from coordinator.audit import AuditLog, local_operator
from coordinator.commands.connection import Where, reached
from coordinator.commands.runs import _progress
from coordinator.faults import StorageFault, StorageFull
from coordinator.model_download import download_model
from coordinator.progress import RunProgress
from coordinator.run_state import Phase, RunState, Wish
from fedloom.adapters import read_adapter
from fedloom.errors import ConfigError, Reason, Refused, refused_from_rpc
from fedloom.plans import ADAPTER_FILE
from fedloom.v1 import admin_pb2, admin_pb2_grpc
from tests.integration.federation import LAYOUT, Federation, command, free_ports, until

ROOT = Path(__file__).parents[2]
MAIN = "from coordinator.app import main; main()"
VERSION = (("fedloom-admin-version", "1"),)


def typed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a person does: in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def local(federation: Federation) -> Iterator[AdminClient]:
    with reached(Where(federation.home)) as client:
        yield client


@contextmanager
def raw(federation: Federation) -> Iterator[admin_pb2_grpc.AdminServiceStub]:
    """The service without the client that knows how to speak to it."""
    socket = find_socket(federation.home)
    credentials = grpc.local_channel_credentials(grpc.LocalConnectionType.UDS)
    with grpc.secure_channel(f"unix:{socket}", credentials) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


def refusal(error: pytest.ExceptionInfo[grpc.RpcError]) -> Reason:
    found = refused_from_rpc(error.value)  # type: ignore[arg-type]
    assert found is not None, error.value
    return found.reason


@pytest.fixture
async def elsewhere(federation: Federation) -> tuple[str, Path]:
    """Address and operator's folder of a federation that listens for operators elsewhere."""
    (port,) = free_ports(1)
    await federation.stop()
    file = federation.home / "coordinator.toml"
    lines = [line for line in file.read_text().splitlines() if "admin_listen" not in line]
    file.write_text("\n".join([*lines, f'admin_listen = "127.0.0.1:{port}"']))
    await federation.start()
    folder = federation.folder / "ada"
    command("operator", "add", "ada", "--out", folder, "--home", federation.home)
    return f"127.0.0.1:{port}", folder


def state_of(federation: Federation, run_id: bytes) -> RunState:
    assert federation.conductor is not None
    state = federation.conductor.state_of(run_id)
    assert state is not None
    return state


def expected(states: list[RunProgress]) -> list[int]:
    """Return how many the phases waited for that a watcher has seen."""
    return [state.open_phase.expected for state in states if state.open_phase is not None]


# a run from its file to its model


async def test_a_run_is_started_watched_and_exported(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.services.admin.POLL_SECONDS", 0.01)
    agents = await federation.enrol_all()
    run_id = federation.start_run("plain", rounds=2)
    states: list[RunProgress] = []

    def watch() -> None:
        states.extend(_progress(Where(federation.home), run_id))

    watching = asyncio.create_task(asyncio.to_thread(watch))
    await until("the watcher to see what the run waits for", lambda: 3 in expected(states))
    for agent in agents:
        agent.start()
    for agent in agents:
        await agent.finished()
    await asyncio.wait_for(watching, 60)

    first, last = states[0], states[-1]
    assert (first.run.phase, last.open_phase) == (Phase.GATHERING, None)
    assert (last.run.phase, last.run.completed) == (Phase.COMPLETED, 2)
    assert [entry.summed for entry in last.history] == [3, 3]
    assert [entry.accuracy for entry in last.history] == [0.7, 0.7]
    assert {agent.agent for agent in last.agents} == {agent.name for agent in agents}
    assert last.coordinator_reads == "every update"
    rounds = [len(state.history) for state in states]
    assert rounds == sorted(rounds)

    with local(federation) as client:
        files = download_model(client, run_id, tmp_path / "model").files
    theta = read_adapter(tmp_path / "model" / ADAPTER_FILE, LAYOUT)
    assert files[ADAPTER_FILE] == (tmp_path / "model" / ADAPTER_FILE).stat().st_size
    for agent in agents:
        assert np.array_equal(agent.theta(run_id), theta)


async def test_a_run_pauses_resumes_and_is_cancelled(federation: Federation) -> None:
    agents = await federation.enrol_all()
    for agent in agents:
        agent.engine.may_finish.clear()
    run_id = federation.start_run("plain", rounds=2)
    for agent in agents:
        agent.start()
    await until("training", lambda: all(agent.engine.training.is_set() for agent in agents))
    with local(federation) as client:
        assert client.wish(run_id, Wish.PAUSE).state == "training, then paused"
        await until("the wish to be heard", lambda: state_of(federation, run_id).paused)
        for agent in agents:
            agent.engine.may_finish.set()
        await until("the round to end", lambda: len(federation.store.rounds(run_id)) == 1)
        await until("the pause", lambda: federation.run(run_id).phase is Phase.GATHERING)
        await asyncio.sleep(0.2)  # several ticks, in which a run that is not paused would begin
        assert next(client.runs()).state == "paused"
        assert [agent.engine.begun for agent in agents] == [1, 1, 1]

        for agent in agents:
            agent.engine.may_finish.clear()
        assert client.wish(run_id, Wish.RUN).state == "gathering"
        await until("the next round", lambda: agents[0].engine.begun == 2)
        client.wish(run_id, Wish.CANCEL)
        over = await federation.run_over(run_id)  # in the middle of a round that cannot end
        for agent in agents:
            agent.engine.may_finish.set()
        assert (over.phase, over.reason) == (Phase.FAILED, Reason.RUN_CANCELLED)
        assert next(client.runs()).state == "cancelled"
        with pytest.raises(ConfigError, match="is cancelled already"):
            client.wish(run_id, Wish.RUN)


async def test_a_watcher_sees_the_run_through_a_restart(federation: Federation) -> None:
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    states: list[RunProgress] = []

    def watch() -> None:
        states.extend(_progress(Where(federation.home), run_id))

    watching = asyncio.create_task(asyncio.to_thread(watch))
    await until("the watcher to see the run", lambda: states)
    await federation.stop()
    await until("a watcher without a coordinator", lambda: states[-1].open_phase is None)
    await federation.start()
    await until("a watcher with one", lambda: states[-1].open_phase is not None)
    agent = await federation.enrol("late")
    agent.start()
    await asyncio.wait_for(watching, 60)
    assert states[-1].run.phase is Phase.COMPLETED


# one code path, wherever the service runs


@pytest.mark.parametrize("served", [True, False], ids=["served", "not served"])
async def test_commands_do_the_same_whether_or_not_somebody_serves(
    federation: Federation, served: bool
) -> None:
    if not served:
        await federation.stop()
        assert not (federation.home / SOCKET_FILE).exists()
    home = ("--home", federation.home)
    run_id = federation.start_run("sealed", rounds=3)
    (listed,) = json.loads(command("run", "list", "--json", *home))
    assert (listed["run"], listed["name"], listed["phase"]) == (run_id.hex(), "toy", "gathering")
    assert (listed["completed"], listed["rounds"], listed["agents"]) == (0, 3, 0)
    watched = json.loads(command("run", "watch", listed["run"][:8], "--json", *home))
    assert {key: watched[key] for key in listed} == listed
    assert (watched["waits_for"] is not None) is served
    private = json.loads(command("run", "privacy", "--json", *home))
    assert (private["coordinator_reads"], private["minimum"]) == ("nothing", 3)
    (plan,) = json.loads(command("plan", "list", "--json", *home))
    assert json.loads(command("plan", "show", plan["id"][:8], "--json", *home)) == plan
    shown = json.loads(command("plan", "show", federation.folder / "plan", "--json"))
    assert {key: shown.get(key) for key in plan} == plan | {"runs": 0}
    invited = json.loads(command("invite", "--name", "pi", "--json", *home))
    assert invited["token"].startswith("fl1_")
    assert json.loads(command("agents", "list", "--json", *home)) == []
    command("run", "pause", run_id.hex(), *home)
    assert federation.run(run_id).wish is Wish.PAUSE
    command("run", "resume", run_id.hex(), *home)
    command("run", "cancel", run_id.hex(), *home)
    assert federation.run(run_id).wish is Wish.CANCEL


async def test_answers_and_exit_statuses_for_programs(federation: Federation) -> None:
    home = ("--home", federation.home)
    file = federation.folder / "run.toml"
    file.write_text('plan = "nowhere"\nrounds = 0\nname = "\\u001b[31mx"')
    wrong = typed("run", "start", file, "--json", *home)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    problems = json.loads(wrong.stdout)["problems"]
    assert any("rounds" in problem for problem in problems)
    assert any("nowhere" in problem for problem in problems)

    file.write_text('plan = "plan"\nrounds = 1\nname = "\\u001b[31mx"')
    started = typed("run", "start", file, "--json", *home)
    assert started.returncode == 0
    assert "3 agents are needed, 0 are enrolled" in json.loads(started.stdout)["warnings"][0]
    assert "\x1b" not in typed("run", "list", *home).stdout

    for arguments, status in (
        (("run", "watch", "ffff"), 2),
        (("agents", "show", "nobody"), 1),
        (("run", "export", "--out", federation.folder / "model"), 2),
        (("run", "list", "--coordinator", "localhost:1"), 2),
        (("run", "list", "--home", federation.folder / "nothing"), 2),
        (("run", "start"), 2),
        (("serve", *home), 2),
    ):
        done = typed(*arguments, *(home if "--home" not in arguments else ()))
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        assert "Traceback" not in done.stderr

    command("run", "cancel", json.loads(started.stdout)["run"], *home)
    await until("the cancellation", lambda: federation.store.runs()[0].phase.over)
    over = typed("run", "watch", *home)
    assert (over.returncode, "\x1b" in over.stdout) == (1, False)
    assert over.stdout.splitlines()[0] == r"run \x1b[31mx: cancelled"
    followed = typed("run", "watch", "--json", "--follow", *home)
    assert followed.returncode == 1
    assert [json.loads(line)["reason"] for line in followed.stdout.splitlines()] == [
        "RUN_CANCELLED"
    ]


async def test_a_repeated_request_changes_nothing(federation: Federation) -> None:
    text = f'plan = "{federation.folder / "plan"}"\nrounds = 1'
    with local(federation) as client:
        first = client.start_run(bytes(16), text, "run.toml", federation.folder)
        assert client.start_run(bytes(16), text, "run.toml", federation.folder)[0] == first[0]
        joining = client.invite(bytes(range(32)), "pi", 60.0, 1)
        assert client.invite(bytes(range(32)), "pi", 60.0, 1) == joining
        assert list(client.invitations()) == [joining.invitation]
        revoked = client.revoke_invitation(joining.invitation.invitation_id)
        assert client.revoke_invitation(joining.invitation.invitation_id) == revoked
        assert len(list(client.runs())) == 1


async def test_agents_are_shown_banned_and_let_in_again(federation: Federation) -> None:
    agent = await federation.enrol("pi")
    agent.start()
    await federation.connected([agent])
    with local(federation) as client:
        shown = client.agent("pi")
        assert (shown.agent_id, shown.connected, shown.banned_at) == ("pi", True, None)
        banned = client.ban("pi", "sold\x1b[2J")
        assert banned.banned_at is not None
        assert client.ban("pi", "sold").banned_at == banned.banned_at
        assert (client.agent("pi").ban_reason, client.unban("pi").banned_at) == ("sold", None)
        with pytest.raises(Refused) as caught:
            client.ban("nobody", "")
        assert caught.value.reason is Reason.NOT_FOUND


async def test_a_banned_agent_is_sent_away_and_its_run_goes_on(federation: Federation) -> None:
    agents = await federation.enrol_all()
    for agent in agents:
        agent.engine.may_finish.clear()
    for agent in agents:
        agent.start()
    await federation.connected(agents)
    run_id = federation.start_run("plain", rounds=1, minimum=2)
    await until("training", lambda: all(agent.engine.training.is_set() for agent in agents))
    with local(federation) as client:
        client.ban(agents[0].name, "stolen")
    error = await agents[0].ended()
    assert isinstance(error, Refused)
    assert (error.reason, error.subject) == (Reason.BANNED, "stolen")
    for agent in agents[1:]:
        agent.engine.may_finish.set()
    over = await federation.run_over(run_id)
    assert over.phase is Phase.COMPLETED
    assert len(federation.store.rounds(run_id)[0].slots) == 2


async def test_a_ban_while_nobody_serves_costs_the_run_its_key(federation: Federation) -> None:
    agents = await federation.enrol_all()
    for agent in agents:
        agent.engine.may_finish.clear()
        agent.start()
    await federation.connected(agents)
    run_id = federation.start_run("encrypted", rounds=2, minimum=2)
    await until("training", lambda: all(agent.engine.training.is_set() for agent in agents))
    with local(federation) as client:
        client.wish(run_id, Wish.PAUSE)
    await until("the wish to be heard", lambda: state_of(federation, run_id).paused)
    for agent in agents:
        agent.engine.may_finish.set()
    await until("the pause", lambda: federation.run(run_id).phase is Phase.GATHERING)
    (first,) = federation.store.envelopes(run_id).values()
    assert set(first) == {agent.name for agent in agents}
    await federation.stop()
    with local(federation) as client:
        client.ban(agents[0].name, "stolen")
        client.wish(run_id, Wish.RUN)
    await federation.start()
    assert (await federation.run_over(run_id)).phase is Phase.COMPLETED
    keys = federation.store.envelopes(run_id)
    assert set(keys[max(keys)]) == {agent.name for agent in agents[1:]}
    assert [record.key_id for record in federation.store.rounds(run_id)] == sorted(keys)


@pytest.mark.parametrize("served", [True, False], ids=["served", "not served"])
async def test_who_did_what_is_on_record(federation: Federation, served: bool) -> None:
    if not served:
        await federation.stop()
    run_id = federation.start_run("plain", rounds=1, minimum=1).hex()
    home = ("--home", federation.home)
    command("run", "pause", run_id, *home)
    command("run", "list", *home)
    command("run", "export", "--out", federation.folder / "model", *home)
    command("operator", "add", "ada", "--out", federation.folder / "ada", *home)
    invitation = json.loads(command("invite", "--name", "pi", "--uses", "2", "--json", *home))
    command("invitations", "revoke", invitation["invitation"], *home)
    with pytest.raises(ConfigError):
        command("run", "export", "ffff", "--out", federation.folder / "model", *home)
    log = AuditLog(federation.store.engine)
    assert [(entry.actor, entry.action, entry.subject) for entry in log.entries()] == [
        (local_operator(), "run started", run_id),
        (local_operator(), "run paused", run_id),
        (local_operator(), "model exported", run_id),
        (local_operator(), "operator added", "ada"),
        (local_operator(), "agent invited", "pi"),
        (local_operator(), "invitation revoked", invitation["invitation"]),
    ]


async def test_a_long_list_comes_in_pages(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.admin_client.MAX_PAGE", 2)
    for name in "abcde":
        await federation.enrol(name)
    with local(federation) as client:
        assert [agent.agent_id for agent in client.agents()] == list("abcde")


# downloads


async def test_a_download_that_is_cut_goes_on_where_it_ended(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.export.SENT_PART_BYTES", 2000)
    monkeypatch.setattr("coordinator.model_download.RETRY_SECONDS", 0.0)
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    offsets = []

    class Cut(AdminClient):
        def export(self, run_id: bytes, offset: int = 0) -> Iterator:
            offsets.append(offset)
            for number, step in enumerate(super().export(run_id, offset)):
                if number == 3:
                    raise Unreachable("here", "cut by the test")
                yield step

    socket = find_socket(federation.home)
    assert socket is not None
    client = Cut.local(socket)
    files = download_model(client, run_id, tmp_path / "model").files
    client.close()
    assert sum(files.values()) > 5000
    assert len(offsets) > 5
    assert offsets == sorted(set(offsets))
    theta = read_adapter(tmp_path / "model" / ADAPTER_FILE, LAYOUT)
    assert np.array_equal(theta, federation.initial_theta())
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


async def test_a_folder_of_someones_files_is_refused_before_anything_is_fetched(
    federation: Federation, tmp_path: Path
) -> None:
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    with local(federation) as client, pytest.raises(ConfigError, match=r"thesis\.tex"):
        download_model(client, run_id, folder)
    assert os.listdir(folder) == ["thesis.tex"]


async def test_an_offset_beyond_the_end_is_refused(federation: Federation) -> None:
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    request = admin_pb2.ExportRunRequest(run_id=run_id, offset=1 << 40)
    with raw(federation) as stub, pytest.raises(grpc.RpcError) as caught:
        list(stub.ExportRun(request, metadata=VERSION))
    assert refusal(caught) is Reason.MALFORMED


# elsewhere


async def test_an_operator_elsewhere_does_the_same(
    federation: Federation, elsewhere: tuple[str, Path], tmp_path: Path
) -> None:
    address, folder = elsewhere
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    where = ("--coordinator", address, "--operator", folder)
    (listed,) = json.loads(command("run", "list", "--json", *where))
    assert listed["run"] == run_id.hex()
    command("run", "export", "--out", tmp_path / "model", *where)
    last = AuditLog(federation.store.engine).entries()[-1]
    assert (last.actor, last.action) == ("operator ada", "model exported")
    theta = read_adapter(tmp_path / "model" / ADAPTER_FILE, LAYOUT)
    assert np.array_equal(theta, federation.initial_theta())
    with reached(Where(coordinator=address, operator=folder)) as client:
        relative = client.start_run(bytes(16), 'plan = "plan"\nrounds = 1', "run.toml", None)
        assert isinstance(relative, NotStarted)
        by_id = f'plan = "{listed["plan"]}"\nrounds = 1'
        started = client.start_run(bytes(16), by_id, "run.toml", None)
        assert not isinstance(started, NotStarted)
        assert started[0].plan_id.hex() == listed["plan"]


async def test_an_operator_who_is_removed_is_shut_out_at_once(
    federation: Federation, elsewhere: tuple[str, Path]
) -> None:
    address, folder = elsewhere
    with reached(Where(coordinator=address, operator=folder)) as client:
        assert list(client.runs()) == []
        command("operator", "remove", "ada", "--home", federation.home)
        with pytest.raises(Refused) as caught:  # on the connection that stands
            list(client.runs())
        assert caught.value.reason is Reason.NOT_PERMITTED
    again = reached(Where(coordinator=address, operator=folder))
    with again as client, pytest.raises(Unreachable):  # and on a new one
        list(client.runs())
    (federation.folder / "ada").rename(federation.folder / "old")
    command("operator", "add", "ada", "--out", folder, "--home", federation.home)
    with reached(Where(coordinator=address, operator=folder)) as client:
        assert list(client.runs()) == []


@pytest.mark.parametrize("shown", ["an agent's", "the server's", "one of another coordinator"])
async def test_other_certificates_open_no_operator_s_door(
    federation: Federation, elsewhere: tuple[str, Path], tmp_path: Path, shown: str
) -> None:
    address, folder = elsewhere
    if shown == "an agent's":
        pem = ((await federation.enrol("pi")).home / "agent.pem").read_bytes()
        for name in ("operator.key", "operator.pem"):
            (folder / name).write_bytes(pem)  # a key and its certificate in one file
    elif shown == "the server's":
        shutil.copy(federation.home / "server.key", folder / "operator.key")
        shutil.copy(federation.home / "server.pem", folder / "operator.pem")
    else:
        command("init", "--home", tmp_path / "other")
        shutil.rmtree(folder)
        command("operator", "add", "ada", "--out", folder, "--home", tmp_path / "other")
        shutil.copy(federation.home / "authority.pem", folder / "authority.pem")
    stranger = reached(Where(coordinator=address, operator=folder))
    with stranger as client, pytest.raises(Unreachable):
        list(client.runs())


async def test_an_agent_s_port_is_no_operator_s_door(federation: Federation) -> None:
    identity = (await federation.enrol("pi")).identity

    def ask() -> grpc.StatusCode:
        credentials = identity.channel_credentials()
        with grpc.secure_channel(identity.control_address, credentials) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.ListRuns(admin_pb2.ListRunsRequest(), metadata=VERSION)
            return caught.value.code()  # type: ignore[attr-defined]

    assert await asyncio.to_thread(ask) is grpc.StatusCode.UNIMPLEMENTED


# errors


@pytest.mark.parametrize("spoken", [None, "0", "2", "x"])
async def test_another_version_is_told_what_to_do(
    federation: Federation, spoken: str | None
) -> None:
    metadata = () if spoken is None else ((VERSION[0][0], spoken),)
    with raw(federation) as stub:
        for call in (
            lambda: stub.ListRuns(admin_pb2.ListRunsRequest(), metadata=metadata),
            lambda: list(stub.WatchRun(admin_pb2.WatchRunRequest(), metadata=metadata)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert refusal(caught) is Reason.PROTOCOL_UNSUPPORTED


async def test_a_request_that_an_older_coordinator_does_not_know(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(
        sys.modules["coordinator.services.access"].REQUIRED_ROLE,
        "/fedloom.v1.AdminService/ListPlans",
    )
    with local(federation) as client, pytest.raises(Refused, match="the same release") as caught:
        list(client.plans())
    assert caught.value.reason is Reason.PROTOCOL_UNSUPPORTED


async def test_a_fault_of_the_coordinator_tells_no_details(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a path, a key, a row")

    monkeypatch.setattr("coordinator.operations.Operations.runs", fail)
    with local(federation) as client, pytest.raises(Refused) as caught:
        list(client.runs())
    assert caught.value.reason is Reason.INTERNAL
    assert "row" not in caught.value.subject


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(StorageFault, Reason.INTERNAL), (StorageFull, Reason.STORAGE_FULL)],
)
async def test_a_disk_that_fails_is_named(
    federation: Federation,
    monkeypatch: pytest.MonkeyPatch,
    fault: type[StorageFault],
    reason: Reason,
) -> None:
    def fail(*_: object) -> None:
        raise fault("/srv/artifacts", "it is not mounted")

    monkeypatch.setattr("coordinator.published.PublishedFolder.parts", fail)
    run_id = federation.start_run("plain", rounds=1, minimum=1)
    with local(federation) as client, pytest.raises(Refused, match="is not mounted") as caught:
        list(client.export(run_id))
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    "request_",
    [
        admin_pb2.StartRunRequest(),
        admin_pb2.StartRunRequest(run_id=bytes(15), file_name="run.toml"),
        admin_pb2.StartRunRequest(run_id=bytes(16), file_name=".."),
        admin_pb2.StartRunRequest(run_id=bytes(16), file_name="x" * 256),
        admin_pb2.StartRunRequest(run_id=bytes(16), file_name="run.toml", folder="relative"),
        admin_pb2.InviteRequest(secret_sha256=bytes(31), agent_id="a", uses=1),
        admin_pb2.ListRunsRequest(page_token="nothing"),  # noqa: S106 - of a page
        admin_pb2.BanAgentRequest(agent_id="a", reason="x" * 257),
    ],
    ids=lambda request: type(request).__name__,
)
async def test_requests_that_are_malformed(federation: Federation, request_: object) -> None:
    with raw(federation) as stub:
        rpc = getattr(stub, type(request_).__name__.removesuffix("Request"))
        with pytest.raises(grpc.RpcError) as caught:
            rpc(request_, metadata=VERSION)
    assert refusal(caught) is Reason.MALFORMED


async def test_nobody_at_the_address_is_one_clear_line(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    command("init", "--home", tmp_path / "home")
    command("operator", "add", "ada", "--out", tmp_path / "ada", "--home", tmp_path / "home")
    done = typed(
        *("run", "list", "--coordinator", f"127.0.0.1:{port}", "--operator", tmp_path / "ada")
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"127.0.0.1:{port}: no coordinator answers" in line
    assert "admin_listen" in line


async def test_the_local_door_is_the_owner_s_alone(federation: Federation) -> None:
    assert federation.home.stat().st_mode & 0o777 == 0o700
    assert (federation.home / SOCKET_FILE).stat().st_mode & 0o777 == 0o600
