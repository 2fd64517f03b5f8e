"""Two adapters on one base, trained by three devices in two sealed runs, then used together.

It types what an operator and three device owners would type, and prints every command; then it
does on a device what a program of that device would do, and prints what it answers.
"""

import argparse
import contextlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edge_agent.inference import Adapter, load_exported
from edge_agent.statements import Statement
from examples.assistant import rows
from examples.assistant.base import Recipe, save_base
from examples.assistant.device import INTENT, REPLY, Assistant, assistant_of, classifier, written
from examples.demo import AGENTS, ALPHA, SEED, Demo, parser, run
from examples.split import AgentFiles, read_data_set, split, write_labels

JUDGED = 32  # held-out rows whose replies are written
ASKED = 4
_RUN_FILE = """\
name = "{name}"
plan = "plans/{name}"
rounds = {rounds}

[cohort]
minimum = {agents}
size = 10

[training]
epochs = {epochs}
batch_size = 16
{schedule}

[protection]
kind = "sealed"

[deadlines]
gathering = 600
training = 1800
"""
_INTENT_SCHEDULE = 'learning_rate = 3e-3\nround_schedule = "cosine"\nwarmup_rounds = 1'
_REPLY_SCHEDULE = 'learning_rate = 6e-3\nstep_schedule = "cosine"'


@dataclass(frozen=True)
class Quality:
    """What adapters are worth on held-out rows: shares of them, 0..1."""

    intents: float  # labels that are right
    replies: float  # replies that are right to the letter, given the right note


class AssistantDemo(Demo):
    """One demonstration in one folder."""

    def run(self, children: contextlib.ExitStack) -> None:
        """Make a base, train two adapters, answer with both, swap one."""
        started = time.monotonic()
        cache = self._emptied()
        files, _ = self._prepare_data()
        self._build_plan(cache)
        self._title("The operator starts a coordinator and queues both runs; it runs one at a time")
        self._start_coordinator(children)
        for name in (INTENT, REPLY):
            self._title(f"The devices take part in the run {name}, each on data of its own")
            for number, part in enumerate(files, 1):
                self._take_part(children, number, part, name)
            self._await_agents()
            self._agents.clear()
        self._title("One device uses both adapters together: text -> intent -> note -> reply")
        self.use()
        self._title(f"Done in {time.monotonic() - started:.0f} s")

    def _prepare_data(self) -> tuple[list[AgentFiles], list[str]]:
        options = self._options
        train, held_out = read_data_set(options.data, options.text, options.label)
        if options.rows:
            train = train[: options.rows]
        write_labels([("", label) for label in rows.LABELS], self._out / "labels.json")
        files = split(train, held_out, AGENTS, ALPHA, SEED, self._out / "data")
        self._title(f"{len(train):,} rows on {AGENTS} devices; one CSV each serves both adapters")
        for number, part in enumerate(files, 1):
            notes = rows.device_notes(number)
            rows.write_notes(notes, self._notes(number))
            for path in (part.train, part.held_out):
                plain = [(row["text"], row["label"]) for row in rows.read_rows(path)]
                rows.write_rows(plain, notes, path)
            self.console.print(f"  {part.train.name}: {part.rows:,} rows, {len(notes)} notes")
        if options.model is None:
            self._title("The operator's base: a small Llama, trained on public text alone")
            recipe = replace(Recipe(), steps=options.steps)
            save_base(rows.public_texts(train), rows.sayings(), self._base, recipe, self._say)
        return files, []

    def _build_plan(self, cache: Path) -> None:
        base = ("--model", self._base, "--rank", "8", "--targets", "all-linear", "--no-dp")
        self._title("Two plans of that base")
        for name, own in (
            (INTENT, ("--labels", self._out / "labels.json", "--max-tokens", "48")),
            (REPLY, ("--task", "causal-lm", "--prompt", rows.PROMPT, "--answer", rows.ANSWER)),
        ):
            self._command(
                *("fedloom-coordinator", "plan", "build", *base, "--name", name, *own),
                *("--out", self._plan(name), "--cache", cache),
            )

    def _start_coordinator(self, children: contextlib.ExitStack) -> None:
        self._write_run(REPLY, self._options.reply_rounds, 2, _REPLY_SCHEDULE)
        self._write_run(INTENT, self._options.rounds, 1, _INTENT_SCHEDULE)
        super()._start_coordinator(children)

    def _queue_runs(self) -> None:
        for name in (INTENT, REPLY):
            self._command(
                *("fedloom-coordinator", "run", "start", self._run_file(name), *self._home())
            )

    def _write_run(self, name: str, rounds: int, epochs: int, schedule: str) -> None:
        self._run_file(name).write_text(
            _RUN_FILE.format(
                name=name, rounds=rounds, epochs=epochs, schedule=schedule, agents=AGENTS
            )
        )

    def _take_part(
        self, children: contextlib.ExitStack, number: int, files: AgentFiles, name: str
    ) -> None:
        """Let an agent take part in the next run; it joins before its first one."""
        if name == INTENT:
            self._start_agent(children, number, files)
            return
        agent = self._agent(number, self._agent_home(number))
        self._agents.append(
            self._child(children, f"agent-{number}-{name}", *agent, "run", "--once")
        )

    def use(self) -> None:
        """Answer on the first device, roll one adapter back, answer again."""
        home = self._agent_home(1)
        device = assistant_of(home, self._notes(1))
        held_out = rows.read_rows(self._out / "data" / "agent-1-held-out.csv")
        asked = [row["text"] for row in random.Random(SEED).sample(held_out, ASKED)]
        for text in asked:
            self._say(str(device.answer(text)))
        self._say(f"one base for both adapters: {device.base_is_shared}")
        self._judge(device, held_out)
        self._swap(device, asked[0])

    def _judge(self, device: Assistant, held_out: Sequence[dict[str, str]]) -> None:
        self._title("Quality on the first device's held-out rows")
        for name in (INTENT, REPLY):
            for said in device.versions.versions(name):
                if isinstance(said, Statement) and said.evaluation is not None:
                    found = said.evaluation
                    worth = f"right {found.correct / found.count:.1%}"
                    perplexity = f"perplexity {math.exp(found.mean_loss):.2f}"
                    self._say(f"{name} v{said.version}, round {said.round}: {worth}, {perplexity}")
        untrained = [load_exported(self._plan(name), 1) for name in (INTENT, REPLY)]
        trained = [device.library.adapter(name) for name in (INTENT, REPLY)]
        for title, (intent, reply) in (("untrained", untrained), ("federated", trained)):
            found = quality(intent, reply, held_out)
            self._say(
                f"{title}: intents {found.intents:.1%} of {len(held_out)}, replies to the letter "
                f"{found.replies:.1%} of {min(JUDGED, len(held_out))}"
            )

    def _swap(self, device: Assistant, text: str) -> None:
        self._title("An adapter is swapped while the program runs: nothing is loaded again")
        before = device.library.adapter(REPLY)
        models = (*self._agent(1, self._agent_home(1)), "models")
        oldest = str(device.versions.usable(REPLY)[0])
        self._command(*models, "rollback", oldest, "--adapter", REPLY)
        self._say(str(device.answer(text)))
        self._command(*models, "follow", "--adapter", REPLY)
        self._say(str(device.answer(text)))
        after = device.library.adapter(REPLY)
        self._say(f"the same session all the time: {after.model is before.model}")

    def _say(self, text: str) -> None:
        self.console.print(f"  {text}".replace("\n", "\n  "), markup=False)

    @property
    def _base(self) -> Path:
        return Path(self._options.model or self._out / "base")

    def _plan(self, name: str) -> Path:
        return self._out / "plans" / name

    def _run_file(self, name: str) -> Path:
        return self._out / f"{name}.toml"

    def _agent_home(self, number: int) -> Path:
        return self._out / f"agent-{number}"

    def _notes(self, number: int) -> Path:
        return self._out / f"agent-{number}-notes.csv"


def quality(intent: Adapter, reply: Adapter, held_out: Sequence[dict[str, str]]) -> Quality:
    """Measure two adapters; of the replies some, for each is written token by token."""
    texts = [row["text"] for row in held_out]
    found = classifier(intent).answer(intent.theta, texts)
    right = sum(f.label == row["label"] for f, row in zip(found, held_out, strict=True))
    judged = held_out[:JUDGED]
    exact = sum(written(reply, row["text"], row["note"]) == row["reply"] for row in judged)
    return Quality(right / len(held_out), exact / len(judged))


def options() -> argparse.ArgumentParser:
    """Return the options."""
    made = parser(__doc__)
    made.set_defaults(out=Path("assistant-run"), rounds=10, model=None)
    made.add_argument("--reply-rounds", type=int, default=5, help="rounds of the run reply")
    made.add_argument("--steps", type=int, default=Recipe.steps, help="to train the base with")
    made.add_argument("--rows", type=int, default=0, help="to train on, on all devices; 0: all")
    return made


def main() -> None:
    """Run it."""
    run(AssistantDemo(options().parse_args()))


if __name__ == "__main__":
    main()
