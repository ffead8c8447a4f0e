"""Fixtures of the trainer's tests: one tiny model and data set a session, a fresh job a test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_kit import Place
from trainer_kit import Job, make_model, write_data


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path, tiny_data: Path) -> Job:
    return Job(tmp_path / "job", tiny_model, tiny_data)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)
