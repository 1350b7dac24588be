"""The tables that every law is crossed over: one row a backend."""

from __future__ import annotations

from inspect import signature

import pytest

from quailora import (
    FP4,
    GPTQ,
    HQQ,
    NF4,
    NF4GPTQ,
    NF4MSE,
    SVD,
    AlternatingLeastSquares,
    Int8,
    Optimal,
    Quantizer,
    Sign,
    SignGPTQ,
    Solver,
    TorchaoInt8,
    Uniform,
    Zero,
)
from quailora.cli.commands import COMMANDS
from quailora.cli.initializing import run_init
from quailora.cli.measuring import run_compare, run_evaluate
from quailora.core.weightings import GramWeighting
from quailora.methods.recipes import RECIPES
from quailora.support.settings import as_command

# Each with whether it is idempotent in float32.
QUANTIZERS: list[tuple[Quantizer, bool]] = [
    (NF4(), False),  # its second-level scales are rounded again
    (NF4(block_size=32, double_quantization=False), True),
    (FP4(), False),
    (FP4(double_quantization=False), True),
    (Int8(), True),
    (Uniform(), False),  # its scales are rounded to float16
    (Uniform(bits=3, group_size=32, symmetric=True), False),  # the lowest level lies beyond the highest
    (Uniform(bits=2, group_size=None), False),
    (Uniform(bits=8, group_size=7), False),
    (Uniform(bits=3, group_size=16, mse=True), False),
    (Uniform(bits=3, group_size=None, symmetric=True, mse=True), False),
    (GPTQ(), False),
    (GPTQ(bits=3, group_size=32, symmetric=True, damping=0.1, shrinkage=0.0), False),
    (GPTQ(bits=2, group_size=16, activation_order=True), False),
    (GPTQ(bits=4, group_size=16, activation_order=True, static_groups=True, damping_scale="mean"), False),
    (GPTQ(bits=3, group_size=16, mse=True), False),
    (NF4GPTQ(), False),
    (NF4GPTQ(mse=True), False),
    (NF4MSE(), False),
    (NF4MSE(block_size=32, double_quantization=False), False),
    (NF4GPTQ(block_size=32, double_quantization=False, damping=0.1), False),
    (HQQ(), False),
    (HQQ(bits=3, group_size=24), False),
    (Sign(group_size=16), True),
    (SignGPTQ(group_size=24), False),
    (SignGPTQ(group_size=None, damping=0.1, shrinkage=0.0), False),
    (TorchaoInt8(), False),  # its scales reach half a step beyond its highest level
]

SOLVERS: list[Solver] = [
    Zero(),
    SVD(),
    AlternatingLeastSquares(),
    AlternatingLeastSquares(iterations=2, damping=0.01),
    Optimal(),
    Optimal(damping=0.1),
]

CALIBRATED = [solver for solver in SOLVERS if solver.needs_calibration]

each_quantizer = pytest.mark.parametrize("quantizer", [row[0] for row in QUANTIZERS], ids=repr)
each_quantizer_row = pytest.mark.parametrize(("quantizer", "idempotent"), QUANTIZERS, ids=repr)
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
each_recipe = pytest.mark.parametrize("name", list(RECIPES))


def init(model, **options):
    """`quailora init` with these options, from Python: quantizer, solver and metric are objects."""
    quantizer = None if options.get("base") else NF4()
    made = {"quantizer": quantizer, "solver": AlternatingLeastSquares(), "metric": GramWeighting()}
    return run_init(all_options("init", made, model, options))


def evaluate(model, **options):
    """`quailora evaluate` likewise."""
    return run_evaluate(all_options("evaluate", {}, model, options))


def compare(model, **options):
    """`quailora compare` likewise."""
    made = all_options("compare", {"quantizer": NF4()}, model, options)
    return run_compare(made, as_command(COMMANDS["compare"], made))


def all_options(command, made, model, options):
    """Every option of a command by name: those that are given, and defaults."""
    defaults = {name: parameter.default for name, parameter in signature(COMMANDS[command]).parameters.items()} | made
    assert options.keys() <= defaults.keys()
    return {**defaults, "model": model, **options}
