"""Quantization-aware initialization of low-rank adapters.

Whole models: `initialize` for a `PeftModel` in place, `initialize_model` for a model by name, folder or object,
`replace_lora_weights` with the arguments of PEFT's function for LoftQ, `load` for a base with its adapter. After
training: `convert`, `merge`, `merge_full`, `rebase` and `combine`. Budgets: `measure_choices` and `Planner`. One layer:
`Initializer`.

Names are imported when they are first used, so that the command line's help does not wait for PyTorch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.combine import combine
    from .adapters.convert import convert
    from .adapters.frozen import freeze
    from .adapters.lora import LoraScaling
    from .bases import ExistingBase, StoredBase
    from .budget.choices import Choice, possible_choices
    from .budget.measure_choices import measure_choices
    from .budget.measurements import Measurements
    from .budget.plan import BudgetPlan
    from .budget.planning import Planner
    from .calibration.text import TextSource
    from .calibration.windows import Calibration
    from .core.metrics import Diagonal, Gram, Identity, Metric
    from .core.statistics import InputStatistics
    from .core.weightings import (
        DiagonalWeighting,
        FisherWeighting,
        GramWeighting,
        IdentityWeighting,
        MagnitudeWeighting,
        ShrunkWeighting,
        Weighting,
    )
    from .errors import QuailoraError
    from .evaluation.load import load
    from .families import FAMILIES, Correction, Family
    from .layer.initializer import Initializer, LayerInitialization
    from .merging.full import merge_full
    from .merging.merge import merge
    from .merging.rebase import rebase
    from .merging.scales import ScaleTraining
    from .merging.training import MergeTraining
    from .methods.block_training import BlockTraining
    from .methods.method import Method
    from .methods.recipes import RECIPES, Recipe
    from .pipeline.initialize import initialize
    from .pipeline.initialize_model import InitializedModel, initialize_model
    from .pipeline.options import Output, Resources
    from .pipeline.replace_weights import replace_lora_weights
    from .quantizers import (
        FP4,
        GPTQ,
        HQQ,
        NF4,
        NF4GPTQ,
        NF4MSE,
        AutoGPTQ,
        Int8,
        Quantizer,
        Sign,
        SignGPTQ,
        TorchaoInt8,
        Uniform,
    )
    from .schedules import Schedule
    from .solvers import SVD, AlternatingLeastSquares, LowRank, Optimal, Solver, Zero
    from .training.finish import factors_of, finish
    from .training.recalibrate import RecalibrationCallback

_HOMES = {
    "adapters.combine": ("combine",),
    "adapters.convert": ("convert",),
    "adapters.frozen": ("freeze",),
    "adapters.lora": ("LoraScaling",),
    "bases": ("ExistingBase", "StoredBase"),
    "budget.choices": ("Choice", "possible_choices"),
    "budget.measure_choices": ("measure_choices",),
    "budget.measurements": ("Measurements",),
    "budget.plan": ("BudgetPlan",),
    "budget.planning": ("Planner",),
    "calibration.text": ("TextSource",),
    "calibration.windows": ("Calibration",),
    "core.metrics": ("Diagonal", "Gram", "Identity", "Metric"),
    "core.statistics": ("InputStatistics",),
    "core.weightings": (
        *("DiagonalWeighting", "FisherWeighting", "GramWeighting", "IdentityWeighting", "MagnitudeWeighting"),
        *("ShrunkWeighting", "Weighting"),
    ),
    "errors": ("QuailoraError",),
    "evaluation.load": ("load",),
    "families": ("FAMILIES", "Correction", "Family"),
    "layer.initializer": ("Initializer", "LayerInitialization"),
    "merging.full": ("merge_full",),
    "merging.merge": ("merge",),
    "merging.rebase": ("rebase",),
    "merging.scales": ("ScaleTraining",),
    "merging.training": ("MergeTraining",),
    "methods.block_training": ("BlockTraining",),
    "methods.method": ("Method",),
    "methods.recipes": ("RECIPES", "Recipe"),
    "pipeline.initialize": ("initialize",),
    "pipeline.initialize_model": ("InitializedModel", "initialize_model"),
    "pipeline.options": ("Output", "Resources"),
    "pipeline.replace_weights": ("replace_lora_weights",),
    "quantizers": (
        *("FP4", "GPTQ", "HQQ", "NF4", "NF4GPTQ", "NF4MSE", "AutoGPTQ", "Int8", "Quantizer", "Sign", "SignGPTQ"),
        *("TorchaoInt8", "Uniform"),
    ),
    "schedules": ("Schedule",),
    "solvers": ("SVD", "AlternatingLeastSquares", "LowRank", "Optimal", "Solver", "Zero"),
    "training.finish": ("factors_of", "finish"),
    "training.recalibrate": ("RecalibrationCallback",),
}
"""The names that there are at top level, by the module that each is imported from; above, for type checkers."""

__all__ = [
    "FAMILIES",
    "FP4",
    "GPTQ",
    "HQQ",
    "NF4",
    "NF4GPTQ",
    "NF4MSE",
    "RECIPES",
    "SVD",
    "AlternatingLeastSquares",
    "AutoGPTQ",
    "BlockTraining",
    "BudgetPlan",
    "Calibration",
    "Choice",
    "Correction",
    "Diagonal",
    "DiagonalWeighting",
    "ExistingBase",
    "Family",
    "FisherWeighting",
    "Gram",
    "GramWeighting",
    "Identity",
    "IdentityWeighting",
    "InitializedModel",
    "Initializer",
    "InputStatistics",
    "Int8",
    "LayerInitialization",
    "LoraScaling",
    "LowRank",
    "MagnitudeWeighting",
    "Measurements",
    "MergeTraining",
    "Method",
    "Metric",
    "Optimal",
    "Output",
    "Planner",
    "QuailoraError",
    "Quantizer",
    "RecalibrationCallback",
    "Recipe",
    "Resources",
    "ScaleTraining",
    "Schedule",
    "ShrunkWeighting",
    "Sign",
    "SignGPTQ",
    "Solver",
    "StoredBase",
    "TextSource",
    "TorchaoInt8",
    "Uniform",
    "Weighting",
    "Zero",
    "combine",
    "convert",
    "factors_of",
    "finish",
    "freeze",
    "initialize",
    "initialize_model",
    "load",
    "measure_choices",
    "merge",
    "merge_full",
    "possible_choices",
    "rebase",
    "replace_lora_weights",
]

__version__ = version("quailora")


def __getattr__(name: str) -> Any:
    """Import a name of the table when it is first used."""
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(import_module(f".{module}", __name__), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
