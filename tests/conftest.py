"""Fixtures: a tiny language model with a tokenizer, and the hypothesis profile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from families import save_llama
from hypothesis import settings
from pretended import PretendedDevice

from quailora.calibration.text import shipped_text
from quailora.cli.main import main

settings.register_profile("default", deadline=None, max_examples=50, print_blob=True, derandomize=True)
settings.register_profile("stress", parent=settings.get_profile("default"), max_examples=600, derandomize=False)
settings.load_profile("default")
torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other


@pytest.fixture(scope="module")
def all_threads():
    """Unlike the tiny models of the other tests, the real one gains from every core."""
    few = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(few)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk() -> Iterator[None]:
    """The files of tests need not outlive a power failure, and there are thousands; see `test_files` for the calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def gpu() -> Iterator[PretendedDevice]:
    """A GPU that only pretends; see `pretended`."""
    with PretendedDevice() as pretended:
        yield pretended


ACCELERATORS = ["pretended", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=ACCELERATORS)
def accelerator(request) -> str:
    """The name of each device that is no CPU; one only pretends to be a GPU."""
    if request.param == "pretended":
        request.getfixturevalue("gpu")
    return "cuda"


@pytest.fixture(params=ACCELERATORS)
def on_gpu(request) -> Callable[[], AbstractContextManager[object]]:
    """What brings each device that is no CPU here for the body of a `with` statement; its name is "cuda"."""
    return PretendedDevice if request.param == "pretended" else nullcontext


@pytest.fixture(params=["cpu", *ACCELERATORS])
def device(request) -> str:
    """The name of each device."""
    if request.param == "pretended":
        request.getfixturevalue("gpu")
    return "cpu" if request.param == "cpu" else "cuda"


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE of 300 tokens, trained on the shipped text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([shipped_text("calibrate")], vocab_size=300, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tokenizer) -> Path:
    """A random Llama with two blocks, saved with its tokenizer."""
    options = {"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return save_llama(tmp_path_factory.mktemp("tiny-llama"), tokenizer, **options)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real texts beside the checkout, where there is one."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the texts of {folder} are not here")
    return folder


@pytest.fixture
def run(capsys):
    """Run the command line in this process: exit status, standard output, standard error."""

    def run_main(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run_main
