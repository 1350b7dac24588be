"""The laws of schedules, ours and those of others, and that each law can fail."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import pytest

from quailora import GPTQ, NF4, Uniform
from quailora.errors import ConfigurationError
from quailora.schedules import SCHEDULES, SRR, Alternate, HeldOut, MagR, Once, ProjQ, Schedule
from quailora.testing import check_schedule, make_problem

ROWS = [
    (Once(), True),
    (Alternate(rounds=2), True),
    (Alternate(rounds=2, start="low-rank"), True),
    (Alternate(rounds=2, start="outliers"), True),
    (SRR(), True),
    (ProjQ(rounds=2), True),
    (MagR(), False),
    (HeldOut(Once(), (0.1, 10.0)), False),
    (HeldOut(SRR(), (0.1,)), False),
]
"""Each with whether it keeps the better of its own base and of the weight quantized as it is."""


def test_every_schedule_has_a_row():
    assert {type(row[0]) for row in ROWS} == {*SCHEDULES.values()}


@pytest.mark.parametrize(("schedule", "never_worse"), ROWS, ids=repr)
def test_laws_of_schedules(schedule, never_worse):
    check_schedule(schedule, never_worse=never_worse)


@pytest.mark.parametrize("quantizer", [NF4(), Uniform(bits=3, group_size=16), GPTQ(bits=3, group_size=16)], ids=repr)
@pytest.mark.parametrize("schedule", [Once(), Alternate(rounds=2), SRR(), HeldOut(Once())], ids=repr)
def test_laws_of_schedules_on_other_quantizers(schedule, quantizer):
    check_schedule(schedule, make_problem(24, 64, "decaying"), quantizer, never_worse=not schedule.needs_validation)


@dataclass(frozen=True)
class Wrong(Schedule):
    """Breaks one law."""

    law: str
    changes_base: ClassVar[bool] = True

    def choose(self, layer, solve, rank):
        if self.law == "weight":
            layer.weight.mul_(2)
        elif self.law == "format":
            return replace(layer, quantizer=GPTQ(bits=8, group_size=16)).requantized(layer.weight)
        elif self.law == "error":
            return replace(layer.requantized(2 * layer.weight), objective=layer.objective)
        elif self.law == "solutions":
            solve(layer.objective_of(layer.weight))
        elif self.law == "worse":
            return layer.requantized(0 * layer.weight)
        return layer


@final
@dataclass(frozen=True)
class Unsaid(Schedule):
    """Changes the base without saying so."""

    changes_base: ClassVar[bool] = False

    def choose(self, layer, solve, rank):
        return layer.requantized(layer.weight / 2)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Wrong("weight"), "changes the weight in place"),
        (Wrong("format"), "gives another format, in which"),
        (Wrong("error"), "carries the error of another weight"),
        (Wrong("solutions"), "solves for 2 objectives, and solutions is 1"),
        (Wrong("worse"), "worse than quantizing the weight as it is"),
        (Unsaid(), "changes the base, and changes_base is False"),
    ],
    ids=repr,
)
def test_a_broken_law_of_schedules_is_named(schedule, message):
    with pytest.raises(AssertionError, match=message):
        check_schedule(schedule, make_problem(24, 64, "decaying"), never_worse=True)


def test_a_quantizer_that_a_schedule_cannot_work_with_is_refused():
    from quailora import Int8

    with pytest.raises(ConfigurationError, match=r"Int8\(\)"):
        check_schedule(HeldOut(Once()), quantizer=Int8())
