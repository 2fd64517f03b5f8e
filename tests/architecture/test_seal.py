"""No byte from elsewhere reaches a loader of SEAL, and no new file can make one reach it unseen.

SEAL reads what it loads unsafely, and TenSEAL's formats are messages around that. So only
`crypto.bfv` knows either, it loads only what it framed itself, and what it framed has few forms.
"""

import ast
import importlib.machinery
import inspect
import io
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tenseal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crypto import (
    CryptoError,
    RunKey,
    UpdateContext,
    bfv,
    encrypted,
)
from crypto.parameters import RING_DEGREE, BfvParameters
from crypto.wire import HEADER_SIZE, Binding, Kind

ROOT = Path(__file__).parents[2]
BRIDGE, STEPS, WORKERS = "crypto.bfv", "crypto.ciphertexts", "crypto.workers"
BRIDGE_EXPORTS = {"SEED_SIZE", "Ciphertext", "KeyedRing", "Ring"}
# Ways to a module or an attribute that no walk over imports and names would see.
HIDDEN = {
    *("__import__", "eval", "exec", "compile", "attrgetter", "methodcaller"),
    *(
        "import_module",
        "module_from_spec",
        "spec_from_file_location",
        "exec_module",
        "entry_points",
    ),
}
IMPORTERS = {"importlib", "imp", "pkgutil", "runpy", "zipimport", "code"}
PERMITTED = {
    "importlib.util",
    "importlib.util.find_spec",
    "importlib.metadata",
    "importlib.metadata.version",
}
# The operator's own module, named on `plan build`'s command line, where no peer is.
OPERATORS_MODULE = {"coordinator.plans.families.array_learning": ["importlib []", "import_module"]}
FOUND = re.compile("load|from|unsafe|parse|lazy|deserial", re.IGNORECASE)
NO_LOADERS = {"transform_from_ntt", "transform_from_ntt_inplace"}


def _loaders(of: object, seen: set[int]) -> Iterator[str]:
    for name in dir(of):
        if name.startswith("__"):
            continue
        found = getattr(of, name)
        if FOUND.search(name) and callable(found):
            yield name
        ours = inspect.ismodule(found) and found.__name__.startswith("tenseal")
        if (inspect.isclass(found) or ours) and id(found) not in seen:
            seen.add(id(found))
            yield from _loaders(found, seen)


LOADERS = set(_loaders(tenseal, set())) - NO_LOADERS


def test_the_loaders_of_the_installed_tenseal_are_found() -> None:
    assert {"load", "lazy_load", "LoadHeader", "context_from", "ckks_vector_from"} <= LOADERS
    assert len(LOADERS) > 10


def _packages() -> dict[str, Path]:
    """Return what the wheel contains: a package that is added there is looked at here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return {Path(folder).name: ROOT / folder for folder in folders}


def _modules() -> Iterator[tuple[str, Path]]:
    for package, folder in _packages().items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def faults(module: str, source: str) -> list[str]:
    """Return what in a module's source could bring foreign bytes to a loader."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {id(call.func) for call in calls}
    looked_up = {id(name) for call in calls if _called(call) == "find_spec" for name in call.args}
    found: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    found += _import_faults(module, alias.name, set())
            case ast.ImportFrom(names=names):
                origin = _absolute(module, node)
                found += _import_faults(module, origin, {alias.name for alias in names})
            case ast.Name(id=name):
                found += [name] * (name in HIDDEN | LOADERS - {"load"})
            case ast.Attribute(attr=name, value=of):
                found += [name] * _is_foreign(module, name, of, called=id(node) in called)
            case ast.Constant(value=str(text)) if id(node) not in looked_up:
                binaries = ("tenseal", "_tenseal_cpp", "_sealapi_cpp")
                found += [text] * (text in LOADERS or text.split(".")[0] in binaries)
    if module.startswith("crypto"):
        for call in calls:
            computed = _called(call) in ("getattr", "vars") and not _is_self(call.args[0])
            found += [ast.unparse(call)] * computed
    return found


def _called(call: ast.Call) -> str:
    function = call.func
    return getattr(function, "attr", None) or getattr(function, "id", "")


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_foreign(module: str, name: str, of: ast.expr, *, called: bool) -> bool:
    """Whether an attribute leads to a loader, or around what this test can see."""
    in_crypto = module.startswith("crypto")
    if name in LOADERS:  # outside `crypto` nobody has an object of SEAL to load
        return module != BRIDGE and (in_crypto or name != "load")
    if name == "modules":  # of sys; networks have a method of this name
        return module != WORKERS and not called
    private = name.startswith("_") and name not in ("__init__", "__name__")
    return name in HIDDEN - {"eval", "compile"} or (in_crypto and private and not _is_self(of))


def _import_faults(module: str, origin: str, names: set[str]) -> list[str]:
    root, whole = origin.partition(".")[0], {f"{origin}.{name}" for name in names} or {origin}
    of_bridge = {name for name in whole if f"{name}.".startswith(f"{BRIDGE}.")}
    of_steps = {name for name in whole if f"{name}.".startswith(f"{STEPS}.")}
    exported = {f"{BRIDGE}.{name}" for name in BRIDGE_EXPORTS}
    refused = (
        "tenseal" in root and (module, whole) != (BRIDGE, {"tenseal.sealapi"}),
        root in IMPORTERS and not whole <= PERMITTED,
        root == "multiprocessing" and module != WORKERS,  # its pipes unpickle what they carry
        "sys.modules" in whole,
        of_bridge and not (module == STEPS and of_bridge <= exported),
        of_steps and not module.startswith("crypto"),
    )
    return [f"{origin} {sorted(names)}"] * any(refused)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parents = module.split(".")[: -node.level]
    return ".".join([*parents, *([node.module] if node.module else [])])


MODULES = dict(_modules())


def test_the_walk_sees_every_file_that_could_be_imported() -> None:
    assert {BRIDGE, STEPS, WORKERS} <= set(MODULES)
    for folder in _packages().values():
        for path in folder.rglob("*"):
            if path.suffix in importlib.machinery.all_suffixes() and path.suffix != ".py":
                assert path.parent.name == "__pycache__", f"{path}: expected source only"


def _is_generated(path: Path) -> bool:
    stem = path.stem.removesuffix("_grpc")
    return stem.endswith("_pb2") and path.with_name(f"{stem[:-4]}.proto").is_file()


@pytest.mark.parametrize("module", [m for m, path in MODULES.items() if not _is_generated(path)])
def test_no_module_can_bring_foreign_bytes_to_a_loader(module: str) -> None:
    expected = OPERATORS_MODULE.get(module, [])
    assert faults(module, MODULES[module].read_text()) == expected


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("crypto.fast", "import tenseal"),
        ("crypto.fast", "import tenseal.sealapi as seal"),
        ("crypto.fast", "def f():\n    from tenseal import context_from"),
        ("crypto.bfv", "import tenseal as ts"),
        ("crypto.bfv", "from tenseal.sealapi import Ciphertext"),
        ("edge_agent.fast", "import _tenseal_cpp"),
        ("coordinator.fast", "import importlib\nimportlib.import_module('ten' + 'seal')"),
        ("coordinator.fast", "from importlib import import_module as find"),
        ("coordinator.fast", "from importlib import util, machinery"),
        ("coordinator.fast", "import importlib.util\nimportlib.util.module_from_spec(spec)"),
        ("coordinator.fast", "import importlib.metadata\nimportlib.metadata.entry_points()"),
        ("coordinator.fast", "__import__('tenseal')"),
        ("coordinator.fast", "import runpy"),
        ("fedloom.fast", "import sys\nts = sys.modules[name]"),
        ("fedloom.fast", "from sys import modules\nmodules['tenseal'].context_from(data)"),
        ("fedloom.fast", "exec(text)"),
        ("fedloom.fast", "eval(text)"),
        ("crypto.fast", "from crypto.bfv import seal"),
        ("crypto.fast", "from .bfv import Ring"),
        ("crypto.fast", "from . import bfv"),
        ("crypto.ciphertexts", "from .bfv import seal"),
        ("crypto.ciphertexts", "from . import bfv"),
        ("crypto.cohort.fast", "from ..bfv import Ring"),
        ("crypto.cohort.fast", "from .. import bfv"),
        ("coordinator.fast", "import crypto.bfv"),
        ("coordinator.fast", "from crypto import bfv"),
        ("coordinator.fast", "from crypto.ciphertexts import Ciphertext"),
        ("coordinator.fast", "from crypto import ciphertexts"),
        ("crypto.ciphertexts", "total.load(context, path)"),
        ("crypto.ciphertexts", "read = type(total).load"),
        ("crypto.ciphertexts", "getattr(total, 'lo' + 'ad')(context, path)"),
        ("crypto.ciphertexts", "getattr(total, 'load')(context, path)"),
        ("crypto.ciphertexts", "from operator import methodcaller\nmethodcaller(name)(total)"),
        ("crypto.ciphertexts", "ring._put(fields, data)"),
        ("crypto.ciphertexts", "ring._context"),
        ("crypto.ciphertexts", "vars(ring)"),
        ("edge_agent.fast", "vector.lazy_load(data)"),
        ("edge_agent.fast", "ts.ckks_vector_from(context, data)"),
        ("coordinator.fast", "from multiprocessing.connection import Client"),
    ],
)
def test_a_new_file_that_tries_is_seen(module: str, source: str) -> None:
    assert faults(module, source)


# the bridge itself


def _methods(tree: ast.AST, name: str) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]


def test_the_bridge_loads_only_what_it_has_just_framed() -> None:
    tree = ast.parse(MODULES[BRIDGE].read_text())
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in LOADERS]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.func in loads]
    assert len(loads) == len(calls) == 3  # a ciphertext, a plaintext, a secret key
    for call in calls:
        context, path = call.args
        assert ast.unparse(context) == "self._context"
        assert isinstance(path, ast.Call)
        assert ast.unparse(path.func) == "self._put"
    (framing,) = _methods(tree, "_put")
    puts = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _called(n) == "put"]
    inside = [n for n in ast.walk(framing) if n in puts]
    assert len(inside) == 1
    assert all(not put.args for put in puts if put not in inside)  # these empty the file


CONTEXT = UpdateContext(bytes(16), 1, 1, 10, 4, 1, 0.5)
KEY = RunKey(bytes(range(32)))


def _form(loaded: bytes) -> tuple[int, bytes, bytes]:
    """Return an object's length, and what is in it beside the array and the seed."""
    framing = 2 * bfv._HEADER.size + bfv._COUNT.size
    plaintext = len(loaded) == framing + bfv._PLAINTEXT.size + 8 * RING_DEGREE
    start = framing + (bfv._PLAINTEXT if plaintext else bfv._CIPHERTEXT).size
    (count,) = bfv._COUNT.unpack_from(loaded, start - bfv._COUNT.size)
    rest = loaded[start + 8 * count :]
    return len(loaded), loaded[:start], rest[: -bfv.SEED_SIZE]


class _Spy:
    """What SEAL was given to load."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forms: set[tuple[int, bytes, bytes]] = set()
        put = bfv._ObjectFile.put

        def spied(file: bfv._ObjectFile, *parts: bytes) -> str:
            if parts:
                self.forms.add(_form(b"".join(parts)))
            return put(file, *parts)

        monkeypatch.setattr(bfv._ObjectFile, "put", spied)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> _Spy:
    return _Spy(monkeypatch)


def _binding(kind: Kind, member: int) -> Binding:
    return Binding.of(CONTEXT, kind, member, BfvParameters.derive(CONTEXT).id)


def _honest() -> tuple[bytes, bytes]:
    encoder = encrypted.encoder(CONTEXT, 0, KEY, np.random.default_rng(0))
    upload = b"".join(encoder.encode(np.zeros(10, np.float32), 1))
    total = encrypted.accumulator(CONTEXT)
    total.add(0, io.BytesIO(upload))
    summed = b"".join(total.result())
    encrypted.open_sum(CONTEXT, KEY, (0,), io.BytesIO(summed))
    return upload, summed


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), ends=st.booleans())
def test_whatever_comes_seal_loads_objects_of_the_same_few_forms(
    spy: _Spy, seed: int, ends: bool
) -> None:
    upload, summed = _honest()
    forms, spy.forms = spy.forms, set()
    random = np.random.default_rng(seed)
    for whole, kind, member in (
        (upload, Kind.ENCRYPTED_UPDATE, 0),
        (summed, Kind.ENCRYPTED_SUM, 1),
    ):
        body = random.bytes(len(whole) // 2 - HEADER_SIZE)
        if ends:  # residues of a sum that are all below q, or all 2^60 - 1
            body = (b"\0", b"\xff")[seed % 2] * len(body)
        order = (0, 1) if kind is Kind.ENCRYPTED_UPDATE else (1, 0)
        hostile = b"".join(_binding(kind, member).header(c, 1) + body for c in order)
        assert len(hostile) == len(whole)
        if kind is Kind.ENCRYPTED_UPDATE:
            total = encrypted.accumulator(CONTEXT)
            total.add(0, io.BytesIO(hostile))
            assert b"".join(total.result()) != summed
        else:
            with pytest.raises(CryptoError):
                encrypted.open_sum(CONTEXT, KEY, (0,), io.BytesIO(hostile))
    assert spy.forms
    assert spy.forms <= forms
