"""`fedloom-coordinator agents …`, `invitations …` and `invite`."""

import hashlib
import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.commands.connection import (
    DEFAULT_HOME,
    AsJson,
    Coordinator,
    Home,
    Operator,
    Where,
    reached,
)
from coordinator.commands.output import age, day, say, say_json, say_table

if TYPE_CHECKING:
    from coordinator.summaries import AgentSummary, InvitationSummary

agents_app = typer.Typer(help="Enrolled devices.", no_args_is_help=True)
invitations_app = typer.Typer(help="Tokens that let devices join.", no_args_is_help=True)

Agent = Annotated[str, typer.Argument(help="Name of an agent.")]
SECRET_BYTES = 32


def invite(
    name: Annotated[str, typer.Option(help="The agent's name: a-z, 0-9 and '-'.")],
    uses: Annotated[
        int, typer.Option(help="Devices that may join with it; they are called NAME-1, NAME-2 ...")
    ] = 1,
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    hours: Annotated[float, typer.Option(min=0.01, max=24 * 365, help="Validity.")] = 24.0,
    as_json: AsJson = False,
) -> None:
    """Print a token with which a device can join under this name."""
    from fedloom.tokens import EnrolmentToken

    secret = os.urandom(SECRET_BYTES)
    with reached(Where(home, coordinator, operator)) as client:
        joining = client.invite(hashlib.sha256(secret).digest(), name, 3600 * hours, uses)
    token = EnrolmentToken(joining.enrolment_address, secret, joining.authority_certificate)
    if as_json:
        say_json({"token": token.encode(), **joining.invitation.to_json()})
    else:
        say(token.encode())


@invitations_app.command("list")
def list_invitations(
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """List invitations; the tokens themselves are not kept."""
    with reached(Where(home, coordinator, operator)) as client:
        found = list(client.invitations())
    if as_json:
        say_json([invitation.to_json() for invitation in found])
        return
    now = time.time()
    say_table(
        ("invitation", "name", "used", "expires", "state"),
        (
            (
                invitation.invitation_id,
                invitation.agent_id,
                f"{invitation.used} of {invitation.uses}",
                day(invitation.expires_at),
                _standing(invitation, now),
            )
            for invitation in found
        ),
    )


def _standing(invitation: "InvitationSummary", now: float) -> str:
    if invitation.revoked_at is not None:
        return "revoked"
    if invitation.used >= invitation.uses:
        return "used up"
    return "expired" if invitation.expires_at <= now else "open"


@invitations_app.command("revoke")
def revoke(
    invitation: Annotated[str, typer.Argument(help="Id of an invitation.")],
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """Make an invitation worthless; agents that joined with it stay."""
    with reached(Where(home, coordinator, operator)) as client:
        found = client.revoke_invitation(invitation)
    if as_json:
        say_json(found.to_json())
    else:
        say(f"{found.invitation_id}: revoked")


@agents_app.command("list")
def list_agents(
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """List enrolled agents."""
    with reached(Where(home, coordinator, operator)) as client:
        found = list(client.agents())
    if as_json:
        say_json([agent.to_json() for agent in found])
        return
    now = time.time()
    say_table(
        ("agent", "seen", "certificate until", "state"),
        (
            (agent.agent_id, _seen(agent, now), day(agent.certificate_until), _state(agent))
            for agent in found
        ),
    )


def _seen(agent: "AgentSummary", now: float) -> str:
    return "now" if agent.connected else age(agent.last_seen, now)


def _state(agent: "AgentSummary") -> str:
    return "" if agent.banned_at is None else f"banned: {agent.ban_reason}"


@agents_app.command("show")
def show(
    agent: Agent,
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """Tell what is known of an agent."""
    with reached(Where(home, coordinator, operator)) as client:
        found = client.agent(agent)
    if as_json:
        say_json(found.to_json())
        return
    say_table(
        ("agent", found.agent_id),
        (
            ("enrolled", day(found.enrolled_at)),
            ("certificate until", day(found.certificate_until)),
            ("seen", _seen(found, time.time())),
            ("banned", day(found.banned_at) or "no"),
            *((("reason", found.ban_reason),) if found.banned_at is not None else ()),
        ),
    )


@agents_app.command("ban")
def ban(
    agent: Agent,
    reason: Annotated[str, typer.Option(help="Why, for people; the device's owner reads it.")],
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """Keep an agent out of this federation."""
    with reached(Where(home, coordinator, operator)) as client:
        found = client.ban(agent, reason)
    if as_json:
        say_json(found.to_json())
    else:
        say(f"{found.agent_id}: banned")


@agents_app.command("unban")
def unban(
    agent: Agent,
    home: Home = DEFAULT_HOME,
    coordinator: Coordinator = "",
    operator: Operator = None,
    as_json: AsJson = False,
) -> None:
    """Let a banned agent in again."""
    with reached(Where(home, coordinator, operator)) as client:
        found = client.unban(agent)
    if as_json:
        say_json(found.to_json())
    else:
        say(f"{found.agent_id}: not banned")
