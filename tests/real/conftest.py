"""The real model, once a session: its files, its answers, what hooks make of them, and exports."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from by_hand import logprobs
from commands import data_of
from smollm2 import SmolLM2, smollm2
from smollm2_edits import Subject, loaded


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """A real model is for all threads there are, and no test of another folder is."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real() -> SmolLM2:
    return smollm2()


@pytest.fixture(scope="session")
def subject(real: SmolLM2, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    model = loaded(real.checkpoint)
    return Subject(real, model, logprobs(model, real.texts), tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="session")
def exported(subject: Subject) -> Callable[..., Path]:
    """Return a function that exports an edit once a session: read it, never write to it."""

    @cache
    def export(name: str, carrier: str, *options: object) -> Path:
        out = subject.folder / "-".join([name, carrier, *map(str, options)]).replace("/", "")
        data_of("export", subject.recipe(name), "--to", carrier, "--out", out, *options)
        return out

    return export
