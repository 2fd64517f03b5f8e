"""However data are shared out, every row has one owner, and every client a row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.errors import ConfigError
from simulation.partitions import Partition, by_value, dirichlet, iid, read_partition

SIZES = st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
SEEDS = st.integers(0, 2**32)


def check_shared_out(parts: list[np.ndarray], rows: int, clients: int) -> None:
    assert len(parts) == clients
    assert all(len(part) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(rows))


@given(SIZES, SEEDS)
def test_iid_shares_differ_by_one_row_at_most(sizes: tuple[int, int], seed: int) -> None:
    rows, clients = sizes
    parts = iid(rows, clients, seed)
    check_shared_out(parts, rows, clients)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for one, again in zip(parts, iid(rows, clients, seed), strict=True):
        np.testing.assert_array_equal(one, again)


@given(SIZES, SEEDS, st.floats(1e-3, 100))
def test_dirichlet_shares_cover_the_rows(
    sizes: tuple[int, int], seed: int, concentration: float
) -> None:
    rows, clients = sizes
    labels = np.random.default_rng(seed).integers(0, 5, rows)
    check_shared_out(dirichlet(labels, clients, concentration, seed), rows, clients)


def test_a_small_concentration_skews_labels_and_a_large_one_does_not() -> None:
    labels = np.random.default_rng(0).integers(0, 10, 20_000)

    def largest_share(concentration: float) -> float:
        counts = [
            np.bincount(labels[part], minlength=10)
            for part in dirichlet(labels, 10, concentration, seed=1)
        ]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert largest_share(0.05) > 0.5
    assert largest_share(1000.0) < 0.15


@given(st.lists(st.sampled_from("abc"), min_size=1))
def test_a_columns_values_are_the_clients(values: list[str]) -> None:
    parts = by_value(values)
    check_shared_out(parts, len(values), len(set(values)))
    assert all(len({values[row] for row in part}) == 1 for part in parts)


@pytest.mark.parametrize("text", ["", "iid:3", "dirichlet", "dirichlet:0", "dirichlet:nan", "by:"])
def test_what_is_no_partition_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="dirichlet:NUMBER"):
        read_partition(text)


def test_partitions_are_read() -> None:
    assert read_partition("dirichlet:0.5") == Partition("dirichlet", 0.5)
    assert read_partition("by:writer:id") == Partition("by", column="writer:id")


def test_more_clients_than_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"1\.\.3"):
        iid(3, 4, seed=0)
