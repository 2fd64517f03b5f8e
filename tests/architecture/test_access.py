"""Every RPC stands in the access table, and in it once."""

from grpc_health.v1 import health_pb2

from coordinator.services.access import REQUIRED_ROLE, Role
from fedloom.v1 import artifact_pb2, control_pb2, enrolment_pb2


def test_every_rpc_has_a_required_role() -> None:
    rpcs = {
        f"/{service.full_name}/{method.name}"
        for module in (artifact_pb2, control_pb2, enrolment_pb2, health_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert len(rpcs) == 6
    assert set(REQUIRED_ROLE) == rpcs


def test_only_enrolment_and_health_are_open_to_anyone() -> None:
    open_rpcs = {rpc for rpc, role in REQUIRED_ROLE.items() if role is Role.ANYONE}
    assert open_rpcs == {
        "/fedloom.v1.EnrolmentService/Enrol",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    }
