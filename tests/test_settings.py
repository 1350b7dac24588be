"""How components are written down, and read again, those of earlier versions among them."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from quailora import GPTQ, NF4, SVD, AlternatingLeastSquares, Quantizer, Solver, Uniform
from quailora.core.weightings import WEIGHTINGS, Weighting
from quailora.methods.distillation import Distillation
from quailora.quantizers import QUANTIZERS
from quailora.schedules import SCHEDULES, SRR, HeldOut, Schedule
from quailora.solvers import SOLVERS
from quailora.support.settings import build, class_path, describe, find_class, short_name, subclasses


@dataclass(frozen=True)
class Doubled(Quantizer):
    """A quantizer that does not belong to quailora, with a short name."""

    name = "doubled"
    bits: int = 4

    def encode(self, weight, statistics):
        return Uniform(self.bits).encode(weight, statistics)

    def stock_config(self):
        return None


def through_json(value):
    return json.loads(json.dumps(describe(value)))


@pytest.mark.parametrize(
    ("interface", "component", "written"),
    [
        (Quantizer, NF4(), "nf4"),
        (Quantizer, GPTQ(bits=3), "gptq"),
        (Quantizer, Doubled(3), f"{__name__}.Doubled"),
        (Solver, AlternatingLeastSquares(), "quailora"),
        (Schedule, HeldOut(SRR()), "held_out"),
    ],
    ids=repr,
)
def test_own_classes_have_short_names_and_others_their_import_path(interface, component, written):
    found = through_json(component)
    assert found["class_path"] == written
    assert build(interface, found) == component


def test_a_schedule_in_a_schedule_has_a_short_name_too():
    assert through_json(HeldOut(SRR()))["init_args"]["schedule"] == {"class_path": "srr", "init_args": {}}


@pytest.mark.parametrize(
    ("interface", "path", "expected"),
    [
        (Quantizer, "quailora.quantizers.nf4.NF4", NF4),
        (Quantizer, "quailora.NF4", NF4),
        (Quantizer, "quailora.some.module.that.has.moved.GPTQ", GPTQ),
        (Quantizer, "Doubled", Doubled),
        (Quantizer, "doubled", Doubled),
        (Solver, "quailora.solvers.als.AlternatingLeastSquares", AlternatingLeastSquares),
        (Solver, "svd", SVD),
        (Schedule, "quailora.schedules.preserve.Preserve", SRR),
        (Quantizer, "elsewhere.NF4", None),
        (Quantizer, "quailora.Nothing", None),
        (Quantizer, "", None),
        (Solver, "nf4", None),
    ],
)
def test_names_of_this_and_of_earlier_versions_are_found(interface, path, expected):
    assert find_class(interface, path) is expected


def test_a_training_is_read_under_its_earlier_name():
    written = through_json(Distillation(steps=3))
    assert written["class_path"] == "Distillation"
    for path in (written["class_path"], "quailora.polish.Polish", "quailora.methods.distillation.Distillation"):
        assert build(Distillation, written | {"class_path": path}) == Distillation(steps=3)
    assert find_class(Distillation, "quailora.NF4") is None


def test_every_class_that_can_be_written_down_has_a_name_of_its_own():
    tables = ((Quantizer, QUANTIZERS), (Solver, SOLVERS), (Schedule, SCHEDULES), (Weighting, WEIGHTINGS))
    for interface, table in tables:
        own = [cls for cls in subclasses(interface) if class_path(cls).startswith("quailora.")]
        names = [short_name(cls) for cls in own if short_name(cls)]
        assert sorted(names) == sorted(table)
        assert all(find_class(interface, name) is cls for name, cls in table.items())


def test_a_subclass_does_not_inherit_a_short_name():
    @dataclass(frozen=True)
    class Nested(Doubled):
        pass

    assert short_name(Nested) == ""
    assert find_class(Quantizer, "doubled") is Doubled
