"""The pure parts of benchmarks/training.py: what is counted, and what is held against what."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.installed import OTHER, Installed, sizes
from benchmarks.training_models import MODELS
from benchmarks.training_report import (
    TITLES,
    Figures,
    Measured,
    Target,
    report,
    summary,
    targets,
)

POSITIVE = st.floats(1e-6, 1e9)


def figures(ours: Measured, torch: Measured, installed: int = 0) -> Figures:
    """Return figures that are the same for both models."""
    rivals = dict.fromkeys(TITLES, ours) | {"torch": torch}
    ways = {way: Installed({"numpy": installed}, 0) for way in ("pip", "listed", "slim")}
    return Figures(
        {(model, rival): one for model in MODELS for rival, one in rivals.items()},
        {"product": ours, "torch": torch},
        ours,
        clipping=1.0,
        download=(4, 1),
        installed=ways if installed else {},
    )


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_verdicts_follow_from_the_ratios(faster: float, smaller: float) -> None:
    ours = Measured(1.0, 1.0, 0.1, 0.1, 1.0)
    found = figures(ours, Measured(faster, faster, 4, 4, smaller))
    verdicts = {target.name: target.met for target in targets(found)}
    for model in MODELS:
        assert verdicts[f"{model}: steps per torch's, CPU"] == (faster >= 1.3)
        assert verdicts[f"{model}: peak RSS over torch's"] == (1 / smaller <= 0.45)
    assert verdicts["tokens decoded per torch's, CPU"] == (faster >= 2)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1))
def test_the_best_time_and_the_worst_size_count(every: list[tuple[float, float]]) -> None:
    found = summary({"cpu_seconds": cpu, "peak_bytes": peak} for cpu, peak in every)
    assert found.cpu_seconds == min(cpu for cpu, _ in every)
    assert found.peak_bytes == max(peak for _, peak in every)


@pytest.mark.parametrize("installed", [0, 10**6])
def test_every_row_has_its_columns_and_every_target_a_row(installed: int) -> None:
    one = Measured(0.1, 0.1, 0.1, 0.1, 1e8)
    found = figures(one, one, installed)
    text = report(found)
    for table in text.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert all(f"| {target.name} |" in text for target in targets(found))
    assert text.count("missed") == sum(not target.met for target in targets(found))


def test_a_limit_itself_is_within() -> None:
    assert Target("", 1.3, 1.3).met
    assert Target("", 1.3, 1.3, at_least=True).met


def test_bytes_are_counted_once_for_the_package_that_brought_them(tmp_path: Path) -> None:
    def add(name: str, size: int) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
        return f"{name},,\n"

    for package, size in (("one", 10), ("pip", 1000)):
        record = add(f"{package}/code.py", size) + add(f"{package}/__pycache__/code.pyc", 7 * size)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "RECORD").write_text(record)
    add("stray.txt", 5)
    add("one/__pycache__/made_later.pyc", 3)
    found = sizes(tmp_path)
    unlisted = {OTHER: found.packages[OTHER]}  # the metadata of both, and the stray file
    assert found.packages == {"one": 10} | unlisted
    assert found.bytecode == 73
    assert found.total == 83 + found.packages[OTHER]
