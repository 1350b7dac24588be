"""Every hyper-parameter is checked when its component is made."""

from __future__ import annotations

import math

import pytest

from quailora import FP4, GPTQ, HQQ, NF4, NF4GPTQ, NF4MSE, SVD, AlternatingLeastSquares, Optimal, Uniform
from quailora.core.weightings import FirstTokenWeighting
from quailora.errors import ConfigurationError
from quailora.families import Shira
from quailora.methods.distillation import Distillation
from quailora.schedules import Alternate, HeldOut, MagR, Once, ProjQ


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("component", "settings", "message"),
    [
        *(
            (four_bit, {"block_size": 3}, "a block size of 32, 64, .*, got 3")
            for four_bit in (NF4, FP4, NF4MSE, NF4GPTQ)
        ),
        (NF4, {"block_size": "64"}, "got '64'"),
        (Uniform, {"bits": 1}, "Expected 2 to 8 bits, got 1"),
        (Uniform, {"bits": 3.5}, "Expected 2 to 8 bits, got 3.5"),
        (GPTQ, {"group_size": 0}, "group size of at least 1"),
        (GPTQ, {"group_size": 2.5}, "group size of at least 1"),
        (GPTQ, {"damping": -0.1}, "damping of at least 0"),
        (GPTQ, {"damping": math.nan}, "damping of at least 0"),
        (GPTQ, {"shrinkage": 1.0}, "shrinkage from 0 to below 1"),
        (GPTQ, {"shrinkage": math.nan}, "shrinkage from 0 to below 1"),
        (NF4GPTQ, {"damping_scale": "mode"}, "a damping_scale of mean, median, got 'mode'"),
        (GPTQ, {"damping_scale": "mode"}, "a damping_scale of mean, median, got 'mode'"),
        (HQQ, {"bits": 7}, "a number of bits of 1, 2, .*, got 7"),
        (HQQ, {"group_size": 0}, "group size of at least 1"),
        (Optimal, {"damping": math.inf}, "finite damping"),
        (Optimal, {"tolerance": math.nan}, "tolerance above 0"),
        (SVD, {"tolerance": 0.0}, "tolerance above 0"),
        (AlternatingLeastSquares, {"iterations": -1}, "iterations of at least 0"),
        (Alternate, {"rounds": 0}, "at least 1 round"),
        (Alternate, {"start": "outlier"}, "a start of quantize, low-rank, outliers"),
        (ProjQ, {"rounds": 0}, "at least 1 round"),
        (MagR, {"alpha": math.nan}, "an alpha of at least 0"),
        (HeldOut, {"schedule": Once(), "dampings": (-1.0,)}, "damping of at least 0"),
        (FirstTokenWeighting, {"share": 1.0}, "shrinkage from 0 to below 1"),
        (Shira, {"support": "random"}, "a support of pursuit, adaalloc, got 'random'"),
        (Distillation, {"learning_rate": math.nan}, "learning rate above 0"),
        (Distillation, {"target": "texts"}, "a target of full precision, text"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(component, settings, message):
    """The run-time checker of the tests would come first for values of another type, so it is passed by."""
    made = object.__new__(component)
    for name, field in component.__dataclass_fields__.items():
        object.__setattr__(made, name, settings.get(name, field.default))
    with pytest.raises(ConfigurationError, match=message):
        made.__post_init__()
