"""Random problems for the laws."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from quailora.testing import INPUT_KINDS, Problem, make_problem

SHAPES = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([(1, 200), (200, 1), (3, 150), (150, 3), (1, 1), (64, 64)]),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@st.composite
def problems(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Problem:
    """A weight of any shape, scale and dtype, with inputs of any kind."""
    out_features, in_features = draw(SHAPES)
    problem = make_problem(
        out_features,
        in_features,
        draw(st.sampled_from(INPUT_KINDS)),
        scale=10 ** draw(st.floats(-3, 2)),
        seed=draw(st.integers(0, 2**20)),
    )
    weight = problem.weight.to(draw(st.sampled_from(dtypes)))
    return Problem(weight, problem.inputs.to(draw(st.sampled_from([torch.float32, torch.float64]))), problem.label)
