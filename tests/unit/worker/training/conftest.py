from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.worker.training.micro import (
    Bench,
    micro_policy,
    random_pairs,
    write_gpt2,
    write_llama,
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("micro") / "llama")


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("micro") / "gpt2")


@pytest.fixture(scope="session")
def bench(llama_folder: Path) -> Bench:
    """One resident model; every run resets its adapter."""
    return Bench(micro_policy(llama_folder), random_pairs(12))
