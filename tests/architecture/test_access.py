"""Every RPC stands in the access table, and in it once."""

from coordinator.services.access import REQUIRED_ROLE, Role
from fedloom.v1 import admin_pb2, artifact_pb2, control_pb2, enrolment_pb2


def test_every_rpc_has_a_required_role() -> None:
    rpcs = {
        f"/{service.full_name}/{method.name}"
        for module in (admin_pb2, artifact_pb2, control_pb2, enrolment_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert len(rpcs) == 21
    assert set(REQUIRED_ROLE) == rpcs


def test_only_enrolment_is_open_to_anyone() -> None:
    open_rpcs = [rpc for rpc, role in REQUIRED_ROLE.items() if role is Role.ANYONE]
    assert open_rpcs == ["/fedloom.v1.EnrolmentService/Enrol"]


def test_operators_alone_are_admitted_by_the_admin_service() -> None:
    service = "/fedloom.v1.AdminService/"
    admitting = {rpc for rpc, role in REQUIRED_ROLE.items() if role is Role.OPERATOR}
    assert admitting == {rpc for rpc in REQUIRED_ROLE if rpc.startswith(service)}
    assert len(admitting) == 17
