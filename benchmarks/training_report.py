"""What `training.py` found: the table, and the targets that it is held against."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.figures import MEGABYTE
from benchmarks.installed import Installed
from benchmarks.training_models import MODELS, SHAPES

LARGEST_PACKAGES = 12
TITLES = {
    "product": "Fedloom, as it comes (256 tokens at once)",
    "product-whole": "Fedloom, the batch at once",
    "torch": "torch + PEFT",
}
_WAYS = {
    "pip": "`fedloom[agent]` as pip installs it",
    "listed": "by the list of `deploy/slim`",
    "slim": "by that list and its script",
}


@dataclass(frozen=True)
class Measured:
    """The least of every time over the repetitions, the most of every size."""

    wall_seconds: float = 0.0  # of a step, or a token
    cpu_seconds: float = 0.0
    import_wall_seconds: float = 0.0
    import_cpu_seconds: float = 0.0
    peak_bytes: float = 0.0


@dataclass(frozen=True)
class Figures:
    """All that was measured; `training` by model and rival."""

    training: Mapping[tuple[str, str], Measured]
    decoding: Mapping[str, Measured]
    agent_import: Measured
    clipping: float  # CPU time of a step with row clipping, over one without
    download: tuple[int, int]  # bytes of the plan in 32 bits, and in 8
    installed: Mapping[str, Installed] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A figure beside its limit: the most that it may be, or the least that it must."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def summary(repetitions: Iterable[Mapping[str, float]]) -> Measured:
    """Return the best of each time and the worst of each size."""
    found: dict[str, float] = {}
    for figures in repetitions:
        for name, value in figures.items():
            choose = max if name == "peak_bytes" else min
            found[name] = choose(found.get(name, value), value)
    return Measured(**found)


def targets(figures: Figures) -> Iterator[Target]:
    """Hold the figures against what was set out for."""
    if figures.installed:
        pip, slim = figures.installed["pip"], figures.installed["slim"]
        listed = figures.installed["listed"]
        yield Target("environment as pip installs it, MB", pip.total / MEGABYTE, 220)
        yield Target("the same without bytecode, MB", pip.without_bytecode / MEGABYTE, 220)
        yield Target("environment by the list, with bytecode, MB", listed.total / MEGABYTE, 220)
        yield Target("slim environment, MB", slim.total / MEGABYTE, 150)
    # In CPU time, as all that follows: on a quiet machine one thread's seconds are the same.
    imported = figures.training["minilm", "product"].import_cpu_seconds
    yield Target("import to train, CPU s", imported, 0.3)
    everything = figures.agent_import.import_cpu_seconds
    yield Target("import with gRPC, HE and inference, CPU s", everything, 0.3)
    for model in MODELS:
        ours, torch = (figures.training[model, rival] for rival in ("product", "torch"))
        faster = torch.cpu_seconds / ours.cpu_seconds
        yield Target(f"{model}: steps per torch's, CPU", faster, 1.3, at_least=True)
        yield Target(f"{model}: peak RSS over torch's", ours.peak_bytes / torch.peak_bytes, 0.45)
    yield Target("int8: download over fp32's", figures.download[1] / figures.download[0], 0.3)
    faster = figures.decoding["torch"].cpu_seconds / figures.decoding["product"].cpu_seconds
    yield Target("tokens decoded per torch's, CPU", faster, 2, at_least=True)
    yield Target("CPU of a step with row clipping over one without", figures.clipping, 1.1)


def report(figures: Figures) -> str:
    """Return everything as Markdown."""
    return "\n".join(_lines(figures))


def _lines(figures: Figures) -> Iterator[str]:
    yield "| model, batch | who | tokens/s | tokens/CPU s | CPU s/step | peak MB | import s (CPU) |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for (model, rival), one in figures.training.items():
        rows, tokens = SHAPES[model]
        count = rows * tokens
        yield (
            f"| {model} {rows}x{tokens} | {TITLES[rival]} | {count / one.wall_seconds:,.0f} "
            f"| {count / one.cpu_seconds:,.0f} | {one.cpu_seconds:.4f} "
            f"| {one.peak_bytes / MEGABYTE:.0f} "
            f"| {one.import_wall_seconds:.2f} ({one.import_cpu_seconds:.2f}) |"
        )
    for rival, one in figures.decoding.items():
        yield (
            f"| llama, decoding | {TITLES[rival]} | {1 / one.wall_seconds:,.0f} "
            f"| {1 / one.cpu_seconds:,.0f} | {one.cpu_seconds:.4f} "
            f"| {one.peak_bytes / MEGABYTE:.0f} | |"
        )
    if figures.installed:
        yield ""
        yield from _installed(figures.installed)
    yield ""
    yield "| target | found | wanted | |"
    yield "|---|---:|---:|---|"
    for target in targets(figures):
        sign = "at least" if target.at_least else "at most"
        verdict = "met" if target.met else "**missed**"
        yield f"| {target.name} | {target.value:.3g} | {sign} {target.limit:g} | {verdict} |"


def _installed(ways: Mapping[str, Installed]) -> Iterator[str]:
    yield "| environment | MB | bytecode, MB | packages, MB |"
    yield "|---|---:|---:|---|"
    for way, one in ways.items():
        largest = list(one.packages.items())[:LARGEST_PACKAGES]
        rest = one.without_bytecode - sum(size for _, size in largest)
        parts = [f"{name} {size / MEGABYTE:.1f}" for name, size in [*largest, ("others", rest)]]
        yield (
            f"| {_WAYS[way]} | {one.total / MEGABYTE:.1f} | {one.bytecode / MEGABYTE:.1f} "
            f"| {', '.join(parts)} |"
        )
