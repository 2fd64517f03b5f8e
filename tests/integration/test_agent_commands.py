"""What a person types on a device, in processes of their own: join, status, and why `run` ended."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edge_agent.config import AgentConfig, load_agent_config, write_agent_config
from edge_agent.data import DataSource
from edge_agent.invitations import keep_invitation
from edge_agent.status import StatusFile, Step
from fedloom.errors import RULES, Reaction, Reason, Refused
from fedloom.privacy import PrivacyTerms, privacy_statement
from fedloom.quality import EvaluationTerms, Report
from fedloom.terms import Protection, Release
from tests.integration.federation import Agent, Federation, command
from tests.integration.processes import ROOT
from tests.integration.rogue import RUN, Rogue, invitation, rogue_coordinator


async def agent_command(home: Path, *arguments: str) -> tuple[int, str, str]:
    """Run `fedloom-agent` and return its status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "edge_agent.app", "--home", home, *arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def told(home: Path, *options: str) -> str:
    """Return what `status` prints."""
    code, out, err = await agent_command(home, *options, "status")
    assert code == 0, err
    return out


@pytest.fixture
async def agent(federation: Federation) -> Agent:
    """Return an agent with data that nobody reads."""
    found = await federation.enrol("kitchen-pi")
    write_agent_config(found.home, AgentConfig(DataSource(found.home / "train.csv")))
    return found


@pytest.fixture
async def rogue(federation: Federation, agent: Agent) -> AsyncIterator[Rogue]:
    """Put the hand-made coordinator in the other's place."""
    async with rogue_coordinator(federation) as found:
        yield found


@pytest.mark.parametrize("release", Release)
async def test_what_is_said_on_joining_is_what_the_device_agrees_to(
    federation: Federation, tmp_path: Path, release: Release
) -> None:
    home, token = tmp_path / "device", federation.invite("device")
    options = ["--data", "train.csv", "--minimum-protection", "encrypted"]
    if release is Release.COORDINATOR:
        options += ["--permit-release", "coordinator"]
    code, _, err = await agent_command(home, "join", token, *options)
    assert code == 0, err
    config = load_agent_config(home)
    assert config.permitted_release is release
    assert config.minimum_protection is Protection.ENCRYPTED


async def test_a_device_that_never_ran_says_so(agent: Agent) -> None:
    out = await told(agent.home)
    assert "has not run yet" in out
    assert "kitchen-pi" in out


async def test_both_sides_print_the_same_privacy_statement(
    federation: Federation, agent: Agent
) -> None:
    kind, release = Protection.SEALED, Release.COORDINATOR
    folder = agent.home / "runs" / RUN.hex()
    folder.mkdir(parents=True)
    keep_invitation(folder, invitation(federation, RUN, kind, release=release, minimum=4))
    StatusFile(agent.home).step(Step.DECLINED, RUN, 1, "KEY_SPENT: expected another")
    unmeasured = EvaluationTerms(Report.NONE)  # as the invitation says
    terms = PrivacyTerms(kind, release, 4, evaluation=unmeasured)
    expected = list(privacy_statement(terms).lines())
    out = await told(agent.home)
    assert "declined, round 1 of run 00010203" in out
    assert "KEY_SPENT: expected another" in out
    printed = [line.strip().partition("  ") for line in out.splitlines() if line.startswith("  ")]
    assert [(party, learns.strip()) for party, _, learns in printed] == expected
    facts = json.loads(await told(agent.home, "--json"))
    [run] = facts["runs"]
    assert [tuple(line) for line in run["privacy"]] == expected
    assert (run["protection"], run["release"], run["minimum"]) == ("sealed", "coordinator", 4)
    assert facts["status"]["is_current"]


async def test_the_coordinators_table_says_what_the_statement_says(federation: Federation) -> None:
    run_id = federation.start_run("encrypted", rounds=1)
    printed = command("run", "privacy", run_id.hex(), "--json", "--home", federation.home)
    statement = privacy_statement(PrivacyTerms(Protection.ENCRYPTED, Release.AGENTS, 3))
    assert json.loads(printed)["coordinator_reads"] == statement.coordinator_reads == "nothing"


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        (Reason.BANNED, "ask the federation's operator"),
        (Reason.CERTIFICATE_EXPIRED, "fedloom-agent join"),
        (Reason.PROTOCOL_UNSUPPORTED, "pip install --upgrade"),
    ],
)
async def test_a_process_that_cannot_go_on_says_why_and_what_to_do(
    rogue: Rogue, agent: Agent, reason: Reason, advice: str
) -> None:
    reactions = {Reason.BANNED: Reaction.STOP, Reason.CERTIFICATE_EXPIRED: Reaction.ENROL}
    assert RULES[reason].reaction is reactions.get(reason, Reaction.UPGRADE)
    rogue.refuses_streams = Refused(reason, "as the test says")
    config = AgentConfig(DataSource(agent.home / "train.csv"), minimum_protection=Protection.PLAIN)
    write_agent_config(agent.home, config)
    code, _, err = await agent_command(agent.home, "run")
    assert code == 1
    [line] = [line for line in err.splitlines() if line.startswith("fedloom-agent: ")]
    assert line == err.splitlines()[-1]
    assert f"{reason.name}: as the test says" in line
    assert advice in line
    out = await told(agent.home)
    assert "not running" in out
    assert f"{reason.name}: as the test says" in out
