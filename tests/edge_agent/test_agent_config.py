"""`agent.toml`: what is written is read again; what is wrong is named."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.config import (
    CONFIG_FILE,
    AgentConfig,
    OnnxSettings,
    TorchSettings,
    load_agent_config,
    write_agent_config,
)
from edge_agent.data import DataSource, Treatment, UnknownLabels
from edge_agent.scrubbing import Kind, Scrub
from fedloom.errors import ConfigError
from fedloom.terms import Protection, Release

_names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
_sources = st.builds(
    DataSource,
    path=_names.map(lambda name: Path("/data") / name.replace("/", "-")),
    text=_names,
    label=_names,
)
_engines = st.builds(
    OnnxSettings, providers=st.lists(_names, min_size=1, max_size=3).map(tuple)
) | st.builds(TorchSettings, device=_names, bfloat16=st.booleans())


@given(
    data=_sources,
    held_out=st.none() | _sources,
    minimum=st.sampled_from(Protection),
    release=st.sampled_from(Release),
    threads=st.integers(0, 1024),
    memory_mb=st.integers(0, 2**24),
    rank=st.integers(0, 2**16),
    engine=_engines,
)
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory,
    data: DataSource,
    held_out: DataSource | None,
    minimum: Protection,
    release: Release,
    threads: int,
    memory_mb: int,
    rank: int,
    engine: OnnxSettings | TorchSettings,
) -> None:
    home = tmp_path_factory.mktemp("home")
    config = AgentConfig(
        data, held_out, minimum, release, threads, memory_mb=memory_mb, engine=engine, rank=rank
    )
    write_agent_config(home, config)
    assert load_agent_config(home) == config


def test_an_owner_who_says_nothing_permits_the_least(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text('[data]\npath = "train.csv"\n')
    config = load_agent_config(tmp_path)
    assert config.minimum_protection is Protection.SEALED
    assert config.permitted_release is Release.AGENTS


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        ('[policy]\nrelease = "everybody"', "policy.release"),
        ("[policy]\nrelease = 2", "policy.release"),
        ("[adapter]\nrank = -1", "adapter.rank"),
        ("[adapter]\nrank = 2.5", "adapter.rank"),
        ('[policy]\nrelease = ["agents"]', "policy.release"),
        ('[policy]\nminimum_protection = "none"', "policy.minimum_protection"),
        ('[policy]\nreleases = "agents"', "policy.releases"),
        ("[engine]\nthreads = -1", "engine.threads"),
        ("[engine]\nmemory_mb = -1", "engine.memory_mb"),
        ('[engine]\nkind = "tensorflow"', "engine.kind"),
        ("[engine]\nkind = 1", "engine.kind"),
        ("[engine]\nprovider = []", "engine.provider"),
        ("[engine]\nprovider = [1]", "engine.provider"),
        ('[engine]\ndevice = "cuda"', "engine.device"),
        ('[engine]\nprecision = "bfloat16"', "engine.precision"),
        ('[engine]\nkind = "torch"\nprovider = "CPUExecutionProvider"', "engine.provider"),
        ('[engine]\nkind = "torch"\nprecision = "float16"', "engine.precision"),
        ('[engine]\nkind = "torch"\ndevice = 0', "engine.device"),
        ("[unknown]", "[unknown]"),
        ("[models]\nkeep = 0", "models.keep"),
        ("[models]\nkeep = true", "models.keep"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, lines: str, where: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(f'[data]\npath = "train.csv"\n{lines}\n')
    with pytest.raises(ConfigError, match=r"expected") as wrong:
        load_agent_config(tmp_path)
    assert where in wrong.value.problem


def write(home: Path, engine: str) -> Path:
    (home / CONFIG_FILE).write_text(f'[data]\npath = "train.csv"\n[engine]\n{engine}\n')
    return home


def test_the_numbers_of_the_engine_have_defaults_and_are_read(tmp_path: Path) -> None:
    config = load_agent_config(write(tmp_path, ""))
    assert (config.threads, config.crypto_processes, config.memory_mb) == (0, 1, 0)
    config = load_agent_config(
        write(tmp_path, "threads = 1024\ncrypto_processes = 0\nmemory_mb = 200")
    )
    assert (config.threads, config.crypto_processes, config.memory_mb) == (1024, 0, 200)


def test_the_engines_names_are_read(tmp_path: Path) -> None:
    assert load_agent_config(write(tmp_path, "")).engine == OnnxSettings()
    one = 'provider = "CUDAExecutionProvider"'
    assert load_agent_config(write(tmp_path, one)).engine.providers == ("CUDAExecutionProvider",)
    torch = 'kind = "torch"\ndevice = "cuda:1"\nprecision = "bfloat16"'
    assert load_agent_config(write(tmp_path, torch)).engine == TorchSettings("cuda:1", True)
    assert load_agent_config(write(tmp_path, 'kind = "torch"')).engine == TorchSettings()


@pytest.mark.parametrize("key", ["threads", "crypto_processes"])
@pytest.mark.parametrize("value", ["-1", "1025", "2.0", '"2"', "true"])
def test_a_number_that_cannot_be_is_refused_by_name(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.{key}"):
        load_agent_config(write(tmp_path, f"{key} = {value}"))


_maybe = st.none() | _names
_columns = st.lists(_names, min_size=1, max_size=3).map(tuple)
_all_keys = st.builds(
    DataSource,
    path=_names.map(lambda name: Path("/data") / name.replace("/", "-")),
    text=_names,
    label=_names,
    words=_names,
    tags=_names,
    prompt=_maybe,
    answer=_maybe,
    arrays=st.dictionaries(_names, _columns, max_size=3).map(lambda d: tuple(d.items())),
)
_treatments = st.builds(
    Treatment,
    st.sampled_from(UnknownLabels),
    st.builds(Scrub, st.lists(st.sampled_from(Kind), unique=True).map(tuple), _maybe),
)


@given(_all_keys, st.none() | _all_keys, _treatments, st.sampled_from([0.0, 0.1, 0.5]))
def test_what_is_said_of_the_data_is_read_again(
    tmp_path_factory: pytest.TempPathFactory,
    data: DataSource,
    held_out: DataSource | None,
    treatment: Treatment,
    share: float,
) -> None:
    home = tmp_path_factory.mktemp("home")
    config = AgentConfig(
        replace(data, treatment=treatment),
        held_out and replace(held_out, treatment=treatment),
        held_out_share=0.0 if held_out else share,
    )
    write_agent_config(home, config)
    assert load_agent_config(home) == config


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        ('arrays = "x"', "data.arrays"),
        ("arrays = { x = [] }", "data.arrays.x"),
        ("arrays = { x = [1] }", "data.arrays.x"),
        ("words = 1", "data.words"),
        ('unknown_labels = "keep"', "data.unknown_labels"),
        ("[split]\nheld_out = 0.9", "split.held_out"),
        ("[split]\nheld_out = true", "split.held_out"),
        ('[split]\nheld_out = 0.1\n[held_out]\npath = "x.csv"', "split.held_out"),
        ('[privacy]\nscrub = ["e-mail"]', "privacy.scrub"),
        ('[privacy]\nscrub = "email"', "privacy.scrub"),
        ("[privacy]\nphone_region = 49", "privacy.phone_region"),
    ],
)
def test_what_is_wrong_about_the_data_is_named(tmp_path: Path, lines: str, where: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(f'[data]\npath = "train.csv"\n{lines}\n')
    with pytest.raises(ConfigError, match=r"expected") as wrong:
        load_agent_config(tmp_path)
    assert where in wrong.value.problem
