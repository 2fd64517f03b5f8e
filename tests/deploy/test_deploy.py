"""The files of deploy/: what they run exists, and they agree with the code and with each other."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from coordinator import server
from coordinator.app import app
from coordinator.premises import ServerConfig
from coordinator.probe import parser as probe_parser
from edge_agent.app import _parser as agent_parser

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
DOCKERFILES = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
CONFIG = ServerConfig()
PORTS = {
    CONFIG.control_port,
    CONFIG.enrolment_port,
    int(CONFIG.metrics_listen.rpartition(":")[2]),
}


def settings(unit: Path) -> dict[str, list[str]]:
    """Return the values of each setting of a unit."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def documents() -> list[dict[str, Any]]:
    """Return every object of the manifests."""
    return [d for path in MANIFESTS for d in yaml.safe_load_all(path.read_text())]


def pods() -> list[dict[str, Any]]:
    """Return the specification of every pod."""
    return [d["spec"]["template"]["spec"] for d in documents() if "template" in d.get("spec", {})]


def containers() -> list[dict[str, Any]]:
    """Return every container, those that initialise included."""
    return [c for pod in pods() for c in (*pod.get("initContainers", []), *pod["containers"])]


def instruction(dockerfile: Path, name: str) -> list[str]:
    """Return the words of the last such instruction of a Dockerfile."""
    found = re.findall(rf"^(?:HEALTHCHECK .*\n +)?{name} (.*)$", dockerfile.read_text(), re.M)
    text = str(found[-1])
    return list(yaml.safe_load(text)) if text.startswith("[") else text.split()


def commands() -> Iterator[list[str]]:
    """Yield every command that units, images and manifests run, without its folder."""
    for unit in UNITS:
        words = shlex.split(settings(unit)["ExecStart"][0])
        yield [Path(words[0]).name, *words[1:]]
    for dockerfile in DOCKERFILES:
        yield instruction(dockerfile, "ENTRYPOINT") + instruction(dockerfile, "CMD")
    for container in containers():
        yield from (part.split() for part in shell_parts(container))
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            if name in container:
                yield container[name]["exec"]["command"]
    yield healthcheck(DEPLOY / "docker" / "coordinator.Dockerfile")


def shell_parts(container: dict[str, Any]) -> list[str]:
    """Return the commands of a container that runs a shell."""
    if container.get("command") != ["sh", "-c"]:
        return []
    return [part.strip() for part in container["args"][0].split("||")[1:]]


def healthcheck(dockerfile: Path) -> list[str]:
    """Return the command of a Dockerfile's health check."""
    text = dockerfile.read_text().partition("HEALTHCHECK ")[2].partition("CMD ")[2]
    return list(yaml.safe_load(text.partition("\n")[0]))


def understands(words: list[str]) -> None:
    """Parse a command as the program would, and do nothing."""
    match words:
        case ["fedloom-coordinator", command, *arguments]:
            group = typer.main.get_command(app)
            group.commands[command].make_context(command, list(arguments))  # type: ignore[attr-defined]
        case ["fedloom-agent", *arguments]:
            agent_parser().parse_args(arguments)
        case ["python", "-m", "coordinator.probe", *arguments]:
            probe_parser().parse_args(arguments)
        case _:
            pytest.fail(f"expected a program of ours, found {words}")


def test_every_command_is_one_that_the_programs_understand() -> None:
    found = list(commands())
    assert len(found) >= 10
    for words in found:
        understands(words)


def test_a_wrong_command_would_be_noticed() -> None:
    with pytest.raises(Exception, match="no-such-option"):
        understands(["fedloom-coordinator", "serve", "--no-such-option"])
    with pytest.raises(SystemExit):
        understands(["fedloom-agent", "no-such-command"])


def test_a_shutdown_has_the_time_that_the_code_takes() -> None:
    needed = server.DRAIN_SECONDS + server.SHUTDOWN_SECONDS
    unit = settings(DEPLOY / "systemd" / "fedloom-coordinator.service")
    assert int(unit["TimeoutStopSec"][0]) > needed
    (stateful,) = (d for d in documents() if d["kind"] == "StatefulSet")
    assert stateful["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > needed


def test_ports_are_those_of_the_configuration() -> None:
    exposed = instruction(DEPLOY / "docker" / "coordinator.Dockerfile", "EXPOSE")
    assert {int(port) for port in exposed} == PORTS
    ports = [p["containerPort"] for c in containers() for p in c.get("ports", ())]
    assert set(ports) == PORTS
    services = [
        p["port"] for d in documents() if d["kind"] == "Service" for p in d["spec"]["ports"]
    ]
    assert set(services) == PORTS


def test_containers_are_nobody_and_may_nothing() -> None:
    users = {instruction(dockerfile, "USER")[0] for dockerfile in DOCKERFILES}
    assert users == {"10001:10001"}
    for pod in pods():
        security = pod["securityContext"]
        assert (security["runAsUser"], security["runAsNonRoot"]) == (10001, True)
        assert pod["automountServiceAccountToken"] is False
    for container in containers():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]


def test_an_image_is_built_from_what_a_wheel_needs() -> None:
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert all((ROOT / name).exists() for name in allowed)
    built = re.findall(r'"/([\w.]+)"', (ROOT / "pyproject.toml").read_text().split("sdist")[1])
    assert set(built) <= set(allowed)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_units_are_valid_and_expose_little(unit: Path, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze")
    copy = tmp_path / unit.name  # the program must exist to be verified
    text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", unit.read_text(), flags=re.M)
    copy.write_text(text)
    verified = subprocess.run(
        [analyze, "verify", "--man=no", str(copy)], check=False, capture_output=True, text=True
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    command = [analyze, "security", "--offline=yes", "--threshold=15", "--no-pager", str(copy)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_fit_the_schema(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for document in yaml.safe_load_all(path.read_text()):
        validate.validate(document, "1.32", strict=True)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfiles_are_clean(path: Path) -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint")
    result = subprocess.run([hadolint, str(path)], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")
