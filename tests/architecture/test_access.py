"""Every RPC stands in the access table, and in it once."""

import importlib
import pkgutil

import fedloom.v1
from coordinator.services.access import REQUIRED_ROLE, Role

RPCS = {
    f"/{service.full_name}/{method.name}": service.full_name
    for module in pkgutil.iter_modules(fedloom.v1.__path__)
    if module.name.endswith("_pb2")
    for service in importlib.import_module(
        f"fedloom.v1.{module.name}"
    ).DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def test_every_rpc_has_a_required_role() -> None:
    assert len(RPCS) >= 5
    assert set(REQUIRED_ROLE) == set(RPCS)


def test_only_enrolment_is_open_to_anyone() -> None:
    open_rpcs = [rpc for rpc, role in REQUIRED_ROLE.items() if role is Role.ANYONE]
    assert open_rpcs == ["/fedloom.v1.EnrolmentService/Enrol"]
