"""The demo with one of its agents on another processor: an arm64 Debian, in a folder, under qemu.

`deploy/arm64/prove.sh` prepares that folder and calls this. The round is sealed, so it ends only if
all three agents opened the sum to the same bits, whatever they computed on.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from examples.demo import AGENTS, SEED, Demo, parser, run
from examples.split import AgentFiles

ROWS = 16  # of the emulated agent: an instruction of its processor is tens of ours
AGENT = "/opt/fedloom/bin/fedloom-agent"


class Arm64Demo(Demo):
    """A demo whose last agent lives in the folder given by --root."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self._root: Path = options.root

    def _prepare_data(self) -> tuple[list[AgentFiles], list[str]]:
        files, sentences = super()._prepare_data()
        for path in (files[-1].train, files[-1].held_out):
            header, *rows = path.read_text().splitlines(keepends=True)
            chosen = random.Random(SEED).sample(rows, min(ROWS, len(rows)))
            path.write_text("".join((header, *chosen)))
        return files, sentences

    def _agent(self, number: int, home: Path) -> tuple[object, ...]:
        if number < AGENTS:
            return super()._agent(number, home)
        return "chroot", self._root, AGENT, "--home", home

    def _answer(self, sentences: Sequence[str]) -> None:
        for number in (1, AGENTS):
            agent = self._agent(number, self._out / f"agent-{number}")
            self._command(*agent, "infer", *sentences)


def main() -> None:
    """Run it; needs root, to enter the folder."""
    options = parser(__doc__)
    options.add_argument("--root", type=Path, required=True, help="folder with the arm64 Debian")
    run(Arm64Demo(options.parse_args()))


if __name__ == "__main__":
    main()
