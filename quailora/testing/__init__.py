"""Conformance checks for quantizers, solvers, schedules and families of adapters, ours and yours.

    from quailora.testing import check_family, check_quantizer, check_schedule, check_solver

    check_quantizer(MyQuantizer(bits=3))
    check_solver(MySolver())
    check_schedule(MySchedule())
    check_family(MyFamily())

Each raises an `AssertionError` that names the broken law and the case. Without further arguments they run over a fixed
set of cases: tiny, wide and tall layers, inputs with a massive channel, dead channels, a single token.
"""

from .families import check_family as check_family
from .families import check_identity as check_identity
from .laws import INPUT_KINDS as INPUT_KINDS
from .laws import InputKind as InputKind
from .laws import Problem as Problem
from .laws import check_quantizer as check_quantizer
from .laws import check_solver as check_solver
from .laws import indefiniteness as indefiniteness
from .laws import make_problem as make_problem
from .laws import optimal_error as optimal_error
from .laws import rounding as rounding
from .laws import standard_problems as standard_problems
from .schedules import check_schedule as check_schedule

__all__ = [
    "INPUT_KINDS",
    "InputKind",
    "Problem",
    "check_family",
    "check_identity",
    "check_quantizer",
    "check_schedule",
    "check_solver",
    "indefiniteness",
    "make_problem",
    "optimal_error",
    "rounding",
    "standard_problems",
]
