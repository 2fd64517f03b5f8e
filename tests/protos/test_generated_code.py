"""What generate.py makes is code: complete, and accepted by its language where this machine can
tell. Every checker is first shown half a file, which it must refuse.
"""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.duration_pb2 import Duration

from fedloom.errors import RULES, Reason, Refused, refusal_trailers
from fedloom.v1 import control_pb2, control_pb2_grpc

LANGUAGES = Path(__file__).parent / "languages"
HELLO = control_pb2.ConnectRequest(
    hello=control_pb2.Hello(
        protocol_version=1,
        software="fedloom é 0.1",
        protections=[control_pb2.PROTECTION_ENCRYPTED, control_pb2.PROTECTION_PLAIN],
        exchange_key=control_pb2.ExchangeKey(public_key=bytes(range(0, 256, 8))),
    )
)

# Strict about our code and its use of the generated declarations, not about the libraries' own.
TSC_OPTIONS = ["--strict", "--skipLibCheck", "--target", "es2022", "--module", "nodenext"]

Generate = Callable[..., Path]

# How each language declares a message and an enum, as a pattern around the name.
DECLARATIONS = {
    "cpp": (r"class {} final\b", r"enum {} : int"),
    "csharp": (r"public sealed partial class {} ", r"public enum {} "),
    "java": (r"public final class {} extends", r"public enum {}\s"),
    "kotlin": (r"object {}Kt \{{", r"public enum {}\s"),
    "node": (r"export declare type {} = Message<", r"export enum {} \{{"),
    "objc": (r"@interface FDL{} : GPBMessage", r"typedef GPB_ENUM\(FDL{}\)"),
    "php": (r"class {} extends \\Google", r"class {}\n\{{"),
    "python": (r"class {}\(_message\.Message\)", r"class {}\(int, "),
    "ruby": (r'{} = .*lookup\("fedloom\.v1\.\w+"\)\.msgclass', r"{} = .*\.enummodule"),
}


def run(*command: str | Path, stdin: bytes = b"", **options: str | Path) -> bytes:
    """Run a program and return what it printed; its own words are the failure's message."""
    done = subprocess.run(
        [str(part) for part in command],
        input=stdin,
        capture_output=True,
        timeout=280,  # pytest gives a test 300
        check=False,
        cwd=options.get("cwd"),
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")[-4000:]
    return done.stdout


def needs(program: str) -> str:
    """Return the program's path, or skip and say so."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not on PATH: generated and searched for declarations only")
    return found


def halve(source: Path, folder: Path) -> Path:
    """Write the first half of a file's lines elsewhere, under the same name."""
    lines = source.read_text().splitlines(keepends=True)
    half = folder / source.name
    half.write_text("".join(lines[: len(lines) // 2]))
    return half


@pytest.mark.parametrize("language", DECLARATIONS)
def test_every_message_and_enum_is_declared(
    generate: Generate, declared: FileDescriptorSet, request: pytest.FixtureRequest, language: str
) -> None:
    out = request.getfixturevalue("node_package") if language == "node" else generate(language)
    code = "\n".join(
        path.read_text()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "node_modules" not in path.parts
    )
    message, enum = DECLARATIONS[language]
    messages = [entry.name for file in declared.file for entry in file.message_type]
    enums = [entry.name for file in declared.file for entry in file.enum_type]
    assert len(messages) >= 38
    assert len(enums) >= 5
    absent = [name for name in messages if not re.search(message.format(name), code)]
    absent += [name for name in enums if not re.search(enum.format(name), code)]
    assert absent == []
    assert not re.search(message.format("NoSuchMessage"), code)


def test_python_messages_and_stubs_import_and_agree(generate: Generate) -> None:
    out = generate("python")
    site = next(Path(sys.prefix).glob("lib/python*/site-packages"))
    # -S and a path of its own: the installed fedloom must not answer for the generated one.
    program = f"""
import sys
sys.path[:0] = [{str(out)!r}, {str(site)!r}]
from fedloom.v1 import control_pb2, control_pb2_grpc, artifact_pb2_grpc, enrolment_pb2_grpc
assert control_pb2.__file__.startswith({str(out)!r}), control_pb2.__file__
assert control_pb2_grpc.ControlServiceStub and artifact_pb2_grpc.ArtifactServiceServicer
message = control_pb2.ConnectRequest.FromString(sys.stdin.buffer.read())
assert message.hello.software == "fedloom é 0.1"
sys.stdout.buffer.write(message.SerializeToString())
"""
    data = HELLO.SerializeToString()
    assert run(sys.executable, "-S", "-c", program, stdin=data) == data
    assert len(list(out.rglob("*_pb2.pyi"))) == len(list(out.rglob("*_pb2.py"))) >= 5


def test_java_is_parsed_by_the_compiler(generate: Generate, tmp_path: Path) -> None:
    java = needs("java")
    needs("javac")  # a runtime without the compiler module cannot parse
    files = sorted(generate("java").rglob("*.java"))
    assert len(files) > 80
    listed = tmp_path / "files"
    listed.write_text("\n".join(map(str, files)))
    assert int(run(java, LANGUAGES / "Parse.java", *files)) == len(files)
    half = halve(next(path for path in files if path.name == "Hello.java"), tmp_path)
    with pytest.raises(AssertionError, match="end of file"):
        run(java, LANGUAGES / "Parse.java", half)


@pytest.mark.parametrize(
    ("language", "suffix", "command"),
    [
        ("csharp", "*.cs", ("mcs", "--parse")),
        ("php", "*.php", ("php", "-l")),
        ("ruby", "*.rb", ("ruby", "-c")),
    ],
    ids=["csharp", "php", "ruby"],
)
def test_scripts_are_parsed(
    generate: Generate, tmp_path: Path, language: str, suffix: str, command: tuple[str, str]
) -> None:
    parser = needs(command[0])
    files = sorted(generate(language).rglob(suffix))
    assert len(files) >= 5
    for file in files:
        run(parser, command[1], file)
    largest = max(files, key=lambda path: path.stat().st_size)
    half = halve(largest, tmp_path)
    with half.open("a") as file_:
        file_.write("\nclass {{{ (\n")
    with pytest.raises(AssertionError):
        run(parser, command[1], half)


def test_go_is_parsed(generate: Generate) -> None:
    gofmt = needs("gofmt")
    for plugin in ("protoc-gen-go", "protoc-gen-go-grpc"):
        needs(plugin)
    files = sorted(generate("go").rglob("*.go"))
    assert len(files) >= 8
    assert run(gofmt, "-l", "-e", *files) == b""


def _matching_protoc(folder: Path) -> str:
    """Return a protoc of the same version as the C++ headers, or skip: C++ demands equality."""
    compiler = needs("g++")
    probe = folder / "version.cc"
    probe.write_text("#include <google/protobuf/stubs/common.h>\nint v = GOOGLE_PROTOBUF_VERSION;")
    found = subprocess.run(
        [compiler, "-std=c++17", "-E", "-P", str(probe)],
        capture_output=True,
        text=True,
        check=False,
    )
    number = re.search(r"int v = (\d+);", found.stdout)
    protoc = shutil.which("protoc")
    if number is None or protoc is None:
        pytest.skip("no libprotobuf-dev with its protoc: C++ is generated and searched only")
    headers = (int(number[1]) // 1000 % 1000, int(number[1]) % 1000)
    stated = re.findall(r"\d+", run(protoc, "--version").decode())
    if headers != (int(stated[-2]), int(stated[-1])):
        pytest.skip(f"protoc {'.'.join(stated)} and headers {headers} differ")
    return protoc


@pytest.mark.integration
def test_cpp_compiles_and_speaks_the_same_bytes(generate: Generate, tmp_path: Path) -> None:
    protoc = _matching_protoc(tmp_path)
    out = generate("cpp", "--protoc", protoc)
    sources = sorted(path for path in out.rglob("*.pb.cc") if ".grpc." not in path.name)
    assert len(sources) >= 5
    program = tmp_path / "round_trip"
    sources.insert(0, LANGUAGES / "round_trip.cc")
    libraries = ("-lprotobuf", "-lpthread")
    run("g++", "-std=c++17", "-O0", f"-I{out}", "-o", program, *sources, *libraries)
    data = HELLO.SerializeToString()
    assert run(program, stdin=data) == data
    other = subprocess.run([program], input=data[:-1], capture_output=True, check=False)
    assert other.returncode == 10


@pytest.fixture(scope="module")
def node_agent(node_package: Path) -> Path:
    """Return agent.js: agent.ts type-checked against the generated declarations and compiled."""
    shutil.copy(LANGUAGES / "agent.ts", node_package)
    tsc = node_package / "node_modules" / ".bin" / "tsc"
    run(tsc, *TSC_OPTIONS, "agent.ts", cwd=node_package)
    return node_package / "agent.js"


@pytest.mark.integration
def test_typescript_refuses_a_field_that_does_not_exist(node_agent: Path) -> None:
    package = node_agent.parent
    wrong = package / "wrong.ts"
    wrong.write_text((package / "agent.ts").read_text().replace("software:", "sofware:"))
    tsc = package / "node_modules" / ".bin" / "tsc"
    with pytest.raises(AssertionError, match="sofware"):
        run(tsc, *TSC_OPTIONS, "--noEmit", "wrong.ts", cwd=package)


@pytest.mark.integration
def test_node_speaks_the_same_bytes(node_agent: Path) -> None:
    data = HELLO.SerializeToString()
    assert run("node", node_agent, "round-trip", stdin=data) == data
    with pytest.raises(AssertionError, match="Error"):
        run("node", node_agent, "round-trip", stdin=data[:-1])


class _Coordinator(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, refused: Refused) -> None:
        self.received: list[control_pb2.ConnectRequest] = []
        self._refused = refused

    async def Connect(  # noqa: N802 - the generated name
        self,
        request_iterator: AsyncIterator[control_pb2.ConnectRequest],
        context: grpc.aio.ServicerContext[control_pb2.ConnectRequest, control_pb2.ConnectResponse],
    ) -> AsyncIterator[control_pb2.ConnectResponse]:
        async for request in request_iterator:
            self.received.append(request)
            if request.WhichOneof("step") == "hello":
                yield control_pb2.ConnectResponse(
                    welcome=control_pb2.Welcome(
                        protocol_version=1, heartbeat_interval=Duration(seconds=15)
                    )
                )
            else:
                code = RULES[self._refused.reason].code
                await context.abort(code, "refused", refusal_trailers(self._refused))


@pytest.mark.integration
async def test_node_talks_grpc_both_ways_and_reads_a_refusal(node_agent: Path) -> None:
    servicer = _Coordinator(Refused(Reason.SUPERSEDED, "a newer stream of agent é"))
    server = grpc.aio.server()
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        url = f"http://127.0.0.1:{port}"
        printed = await asyncio.to_thread(run, "node", node_agent, "connect", url)
    finally:
        await server.stop(None)
    assert json.loads(printed) == {
        "version": 1,
        "interval": 15,
        "code": "Aborted",
        "reason": "SUPERSEDED",
        "subject": "a newer stream of agent é",
    }
    assert servicer.received[0] == HELLO
    assert [request.WhichOneof("step") for request in servicer.received] == ["hello", "heartbeat"]
