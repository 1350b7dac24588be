"""Random projections that all layers share: the same for a layer whatever the others are, and once in the file."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import nn

from quailora.adapters.files import write_adapter
from quailora.adapters.lora import LoraScaling
from quailora.errors import ConfigurationError
from quailora.families.randlora import RandLora
from quailora.families.vera import Vera
from quailora.testing import make_problem
from quailora.testing.families import objective_of

SHAPES = {"wide": (32, 80), "tall": (48, 32), "small": (20, 20)}

each_family = pytest.mark.parametrize("family", [Vera(), RandLora()], ids=lambda family: family.name)


@each_family
def test_a_layer_uses_the_same_numbers_whatever_the_other_layers_are(family):
    """Each layer takes the first entries along every axis; and bfloat16 holds the numbers exactly."""
    shared = family.shared(SHAPES, 5)
    for shape in SHAPES.values():
        for name, alone in family.shared({"layer": shape}, 5).items():
            assert torch.equal(alone, shared[name][tuple(slice(side) for side in alone.shape)])
            assert torch.equal(alone.bfloat16().float(), alone)
            assert not torch.equal(type(family)(1).shared({"layer": shape}, 5)[name], alone)
    right, left = (tensor.flatten()[:100] for tensor in shared.values())
    assert not torch.equal(right.sort().values, left.sort().values)


@each_family
@pytest.mark.filterwarnings("ignore:(Unable to fetch remote file|Could not find a config file):UserWarning")
def test_stock_peft_with_layers_of_several_shapes(family, tmp_path):
    """Stock PEFT computes the changes from one copy of the projections; of RandLoRA it looks for others, and warns."""
    module, corrections = nn.Module(), {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        objective, base = objective_of(make_problem(*shape, "decaying", seed=seed))
        corrections[name] = family.fit(objective, 5).correction
        setattr(module, name, nn.Linear(shape[1], shape[0], bias=False))
        getattr(module, name).weight = nn.Parameter(base, requires_grad=False)
    scaling = LoraScaling(5, alpha=100.0 if family.scales else None)
    targets = {"target_modules": list(SHAPES), "base_model": "base", "shapes": SHAPES}
    write_adapter(tmp_path, corrections, family, scaling, **targets)
    config = PeftConfig.from_pretrained(tmp_path)
    config.task_type = None
    with warnings.catch_warnings(record=True, action="always", category=UserWarning) as caught:
        loaded = PeftModel.from_pretrained(module, tmp_path, config=config)
    assert [str(one.message)[:26] for one in caught] == ["Found missing adapter keys"] * (family.name == "randlora")
    for name, (_, columns) in SHAPES.items():
        layer = getattr(loaded.base_model.model, name)
        expected = layer.base_layer.weight + corrections[name].dense(layer.base_layer.weight)
        torch.testing.assert_close(layer(torch.eye(columns)).T, expected)
        torch.testing.assert_close(layer.base_layer.weight + layer.get_delta_weight("default"), expected)

    loaded.save_pretrained(tmp_path / "again")
    written, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    torch.testing.assert_close({name: again[name] for name in written}, written, rtol=0, atol=0)
    copies = 2 * len(SHAPES) if family.name == "randlora" else 0
    assert len(again) == len(written) + copies


@each_family
def test_a_negative_seed_is_refused(family):
    with pytest.raises(ConfigurationError, match=r"Expected a projection_prng_key from 0 to below 2\^32, got -1\."):
        type(family)(projection_prng_key=-1)
