"""The proto files keep the rules of the contract, and the Python that restates them agrees."""

import re
import shutil
import subprocess
import sys
from enum import IntEnum
from pathlib import Path

import pytest
from google.protobuf.descriptor import EnumDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from fedloom import errors, terms
from fedloom.v1 import (
    admin_pb2,
    artifact_pb2,
    control_pb2,
    enrolment_pb2,
    plan_pb2,
    refusal_pb2,
)

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted((ROOT / "protos").glob("fedloom/v1/*.proto"))
FILES: list[FileDescriptor] = [
    module.DESCRIPTOR
    for module in (admin_pb2, artifact_pb2, control_pb2, enrolment_pb2, plan_pb2, refusal_pb2)
]
ENUMS: list[EnumDescriptor] = [enum for file in FILES for enum in file.enum_types_by_name.values()]
# What the RPCs of the contract are; a new one is added here and thereby to the checks below.
OPERATORS_RPCS = {
    *("StartRun", "ListRuns", "WatchRun", "PauseRun", "ResumeRun", "CancelRun"),
    *("GetRunPrivacy", "ExportRun", "Invite", "ListInvitations", "RevokeInvitation"),
    *("ListAgents", "GetAgent", "BanAgent", "UnbanAgent", "ListPlans", "GetPlan"),
}
RPCS = {"Enrol", "Renew", "Connect", "UploadArtifact", "DownloadArtifact", *OPERATORS_RPCS}
OPTIONS = {
    "csharp_namespace": "Fedloom.V1",
    "go_package": "github.com/fedloom/fedloom/gen/go/fedloom/v1;fedloomv1",
    "java_multiple_files": True,
    "java_package": "dev.fedloom.v1",
    "objc_class_prefix": "FDL",
    "php_namespace": "Fedloom\\V1",
    "ruby_package": "Fedloom::V1",
    "swift_prefix": "Fedloom_V1_",
}


def test_every_proto_file_is_looked_at_here() -> None:
    assert [file.name for file in FILES] == [
        path.relative_to(ROOT / "protos").as_posix() for path in PROTOS
    ]


def test_the_installed_package_is_built_from_these_files(declared: FileDescriptorSet) -> None:
    def fields(files: list[FileDescriptorProto]) -> set[tuple[str, str, str, int]]:
        return {
            (file.name, message.name, field.name, field.number)
            for file in files
            for message in file.message_type
            for field in message.field
        }

    built = [FileDescriptorProto.FromString(file.serialized_pb) for file in FILES]
    assert fields(built) == fields(list(declared.file)), "build again: pip install -e ."


@pytest.mark.parametrize("command", [["lint"], ["format", "--diff", "--exit-code"]], ids=" ".join)
def test_buf_has_nothing_to_say(command: list[str]) -> None:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent))
    assert buf is not None, "buf-bin belongs to the development extra"
    done = subprocess.run(
        [buf, *command], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _rpc_comments() -> dict[str, str]:
    """Return the comment that stands directly above each RPC."""
    found = {}
    for path in PROTOS:
        comment: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            text = line.strip()
            if text.startswith("//"):
                comment.append(text.removeprefix("//").strip())
                continue
            rpc = re.match(r"rpc (\w+)\(", text)
            if rpc:
                found[rpc[1]] = "\n".join(comment)
            comment = []
    return found


def test_every_rpc_says_who_may_call_it_and_in_which_order() -> None:
    comments = _rpc_comments()
    assert set(comments) == RPCS
    assert {
        method.name
        for file in FILES
        for service in file.services_by_name.values()
        for method in service.methods
    } == RPCS
    for name, comment in comments.items():
        assert re.search(r"^Caller: \w", comment, re.MULTILINE), f"{name} does not say its caller"
        assert re.search(r"^Order:", comment, re.MULTILINE), f"{name} does not say its order"
        assert re.search(r"\b1\. ", comment), f"{name} does not number its messages"


def test_operators_call_the_admin_service_and_nothing_else() -> None:
    callers = {
        name: re.findall(r"^Caller: (.*)", comment, re.MULTILINE)
        for name, comment in _rpc_comments().items()
    }
    assert {name for name, found in callers.items() if found == ["an operator."]} == OPERATORS_RPCS
    (service,) = admin_pb2.DESCRIPTOR.services_by_name.values()
    assert {method.name for method in service.methods} == OPERATORS_RPCS
    assert not any(method.client_streaming for method in service.methods)


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.name)
def test_enums_begin_with_a_value_that_is_refused(enum: EnumDescriptor) -> None:
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enum.name).upper()
    assert enum.values[0].number == 0
    assert enum.values[0].name == f"{prefix}_UNSPECIFIED"
    assert all(value.name.startswith(f"{prefix}_") for value in enum.values)
    assert len(enum.values) > 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_hold_one_service_and_name_every_language(file: FileDescriptor) -> None:
    assert file.package == "fedloom.v1"
    assert len(file.services_by_name) <= 1
    for service in file.services_by_name:
        stem = Path(file.name).stem
        assert service.lower() == f"{stem}service", "a service lives in the file named after it"
    options = file.GetOptions()
    assert {name: getattr(options, name) for name in OPTIONS} == OPTIONS
    assert options.java_outer_classname == f"{Path(file.name).stem.capitalize()}Proto"


@pytest.mark.parametrize(
    ("python", "proto"),
    [
        (errors.Reason, refusal_pb2.Reason.DESCRIPTOR),
        (terms.Protection, control_pb2.Protection.DESCRIPTOR),
        (terms.Optimizer, control_pb2.Optimizer.DESCRIPTOR),
        (terms.Strategy, control_pb2.Strategy.DESCRIPTOR),
    ],
    ids=lambda side: side.name if isinstance(side, EnumDescriptor) else "",
)
def test_python_restates_the_enums_exactly(python: type[IntEnum], proto: EnumDescriptor) -> None:
    prefix = proto.values[0].name.removesuffix("UNSPECIFIED")
    stated = {value.name.removeprefix(prefix): value.number for value in proto.values[1:]}
    assert {member.name: member.value for member in python} == stated


def test_every_reason_has_a_rule() -> None:
    assert set(errors.RULES) == set(errors.Reason)
    assert {rule.reaction for rule in errors.RULES.values()} == set(errors.Reaction)
