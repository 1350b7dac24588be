"""What adapters and blocks are trained on: windows of sequences, and the network that the base makes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from helpers import init
from hypothesis import given, settings
from hypothesis import strategies as st

from quailora import initialize_model
from quailora.calibration.sources import BatchCalibration
from quailora.calibration.tokens import CalibrationTokens
from quailora.cli.initializing import asked_distillation
from quailora.errors import CalibrationError
from quailora.methods.distillation import Distillation
from quailora.pipeline.run import ModelRun


def source(lengths):
    """Sequences in which every token is another number."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    sequences = tuple(torch.arange(int(first), int(last)) for first, last in pairwise(starts))
    return BatchCalibration(CalibrationTokens(sequences, (None,) * len(sequences)))


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30).filter(lambda sizes: max(sizes) > 1), st.integers(2, 50))
@settings(max_examples=200)
def test_windows_hold_at_least_half_of_the_tokens(lengths, longest):
    """They are pieces of sequences, of one length, none of which comes twice before all have come once."""
    given_, count = source(lengths), 2 * sum(lengths)
    windows = given_.training_windows(None, count, longest)
    assert windows.shape == (count, windows.shape[1])
    assert windows.shape[1] <= longest
    assert (windows.diff() == 1).all()
    sequences = {tuple(ids.tolist()) for ids in given_.given.sequences}
    assert all(any(set(row.tolist()) <= set(ids) for ids in sequences) for row in windows[:10])
    counted = Counter(map(tuple, windows.tolist()))
    assert max(counted.values()) - min(counted.values()) <= 1
    assert 2 * len(counted) * windows.shape[1] >= sum(size for size in lengths if size > 1)


def test_one_long_sequence_does_not_stand_for_all():
    windows = source([399, *range(20, 220)]).training_windows(None, 400, 512)
    assert len(torch.unique(windows, dim=0)) > 90


def test_sequences_of_one_token_cannot_be_trained_on():
    with pytest.raises(CalibrationError, match="at least two tokens"):
        source([1, 1, 1]).training_windows(None, 4, 8)


def test_a_sequence_in_which_no_token_counts_is_left_out(tiny_llama):
    """As of a conversation that is cut off before its answer; it has no error to train on."""
    ids = torch.arange(24 * 16).reshape(24, 16) % 90
    labels = ids.clone()
    labels[5] = -100
    labels[7, :3] = -100
    tokens = CalibrationTokens.of_batches([{"input_ids": ids, "labels": labels}])
    assert len(tokens.sequences) == 23
    assert sum(kept is not None for kept in tokens.counted) == 1
    initialize_model(str(tiny_llama), "block-trained", [{"input_ids": ids, "labels": labels}])
    with pytest.raises(CalibrationError, match="a token which counts"):
        CalibrationTokens.of_batches([{"input_ids": ids[:1], "labels": torch.full((1, 16), -100)}])


@pytest.mark.parametrize(("length", "batch"), [(64, 16), (512, 2), (None, 2), (2000, 2)])
def test_a_step_has_the_tokens_that_were_asked_for(length, batch):
    options = {"distill": 10, "distill_tokens": 1024, "distill_rate": None, "sequence_length": length}
    found = asked_distillation(None, options)
    assert (found.batch, found.tokens) == (batch, 1024)


def test_settings_of_a_distillation_are_those_of_its_windows(tiny_llama):
    """No window is longer than those of the calibration."""
    result = initialize_model(str(tiny_llama), "distilled", [{"input_ids": torch.arange(64).reshape(4, 16)}])
    assert result.output.plan.method.distillation.sequence_length == 16
    assert Distillation().fitted(600).sequence_length == 512


@pytest.mark.parametrize(("recipe", "expected"), [("quailora", 14), ("best", 14)])
def test_a_distillation_sees_the_base_in_all_of_its_layers(tiny_llama, tmp_path, monkeypatch, recipe, expected):
    """Also in those without an adapter, and where layers were fitted to inputs of full precision."""
    seen = []
    distil = ModelRun.distil

    def watched(run, *arguments):
        seen.append(set(run.layers))
        return distil(run, *arguments)

    monkeypatch.setattr(ModelRun, "distil", watched)
    init(str(tiny_llama), out=str(tmp_path / "a"), recipe=recipe, targets=["q_proj"], distill=1, samples=4)
    assert [len(names) for names in seen] == [expected]
