"""Every RPC stands in the access table, and in it once."""

import importlib
import pkgutil

from grpc_health.v1 import health_pb2

import fedloom.v1
from coordinator.services.access import REQUIRED_ROLE, Role

MODULES = [
    importlib.import_module(f"fedloom.v1.{module.name}")
    for module in pkgutil.iter_modules(fedloom.v1.__path__)
    if module.name.endswith("_pb2")
]
RPCS = {
    f"/{service.full_name}/{method.name}": service.full_name
    for module in (*MODULES, health_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def test_every_rpc_has_a_required_role() -> None:
    assert len(RPCS) >= 7
    assert set(REQUIRED_ROLE) == set(RPCS)


def test_only_enrolment_and_health_are_open_to_anyone() -> None:
    open_rpcs = {rpc for rpc, role in REQUIRED_ROLE.items() if role is Role.ANYONE}
    assert open_rpcs == {
        "/fedloom.v1.EnrolmentService/Enrol",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    }


def test_operators_alone_are_admitted_by_the_admin_service() -> None:
    admitting = {rpc for rpc, role in REQUIRED_ROLE.items() if role is Role.OPERATOR}
    assert admitting == {
        rpc for rpc, service in RPCS.items() if service == "fedloom.v1.AdminService"
    }
    assert len(admitting) == 17
