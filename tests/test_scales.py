"""Scales of the least squared error: against every share one by one, and never worse than those that span the range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import problems

from quailora import NF4, NF4MSE, Uniform
from quailora.quantizers.grid import SHARES
from quailora.testing import make_problem


@pytest.mark.parametrize(
    ("chosen", "spanning", "least"),
    [
        (NF4MSE(), NF4(), 0.9),
        (NF4MSE(block_size=32, double_quantization=False), NF4(32, double_quantization=False), 0.95),
        (Uniform(3, mse=True), Uniform(3), 0.9),
        (Uniform(2, symmetric=True, mse=True), Uniform(2, symmetric=True), 0.9),
    ],
    ids=repr,
)
def test_scales_of_the_least_squared_error(chosen, spanning, least):
    """Less of it, in the same bytes and format."""
    weight = make_problem(64, 256).weight
    found, plain = chosen.quantize(weight), spanning.quantize(weight)
    squared = [(weight - each.dequantize()).square().sum().item() for each in (found, plain)]
    assert squared[0] < least * squared[1]
    assert found.nbytes == plain.nbytes
    assert {name: tensor.dtype for name, tensor in found.tensors().items()} == {
        name: tensor.dtype for name, tensor in plain.tensors().items()
    }


@given(problem=problems(dtypes=(torch.float32,)), bits=st.integers(2, 4), symmetric=st.booleans())
def test_chosen_scales_are_never_worse(problem, bits, symmetric):
    """In squared error, on any weight: those that span the range are among the choices."""
    for chosen, plain in (
        (Uniform(bits, 16, symmetric, mse=True), Uniform(bits, 16, symmetric)),
        (NF4MSE(block_size=32), NF4(block_size=32)),
    ):
        errors = [problem.weight - each.quantize(problem.weight).dequantize() for each in (chosen, plain)]
        assert errors[0].square().sum() <= errors[1].square().sum() * (1 + 1e-5)


def test_chosen_scales_by_definition():
    """The best of all shares for each group, one by one."""
    weight = make_problem(3, 32).weight
    found = Uniform(3, 16, mse=True).quantize(weight).dequantize()
    for row in range(3):
        for start in (0, 16):
            group = weight[row : row + 1, start : start + 16]
            low, high = group.amin().clamp(max=0), group.amax().clamp(min=0)
            errors = []
            for share in (1.0, *SHARES):
                scale = (share * (high - low) / 7).half().float()
                zero = (-share * low / scale).round().clamp(0, 7)
                rounded = (((group / scale).round() + zero).clamp(0, 7) - zero) * scale
                errors.append((group - rounded).square().sum())
            error = (group - found[row : row + 1, start : start + 16]).square().sum()
            torch.testing.assert_close(error, min(errors), rtol=1e-4, atol=1e-9)
