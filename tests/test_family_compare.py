"""Families of adapters side by side, as large as LoRA."""

from __future__ import annotations

import json

import pytest

from quailora.comparison.sizes import ComparedFamilies, of_size, total
from quailora.comparison.table import Row
from quailora.errors import ConfigurationError
from quailora.families import FAMILIES, Lora
from quailora.models.layers import linear_layers
from quailora.models.load import load_model


@pytest.fixture(scope="module")
def layers(tiny_llama):
    return linear_layers(load_model(str(tiny_llama)).model)


@pytest.mark.parametrize("equal", ["numbers", "bytes"])
@pytest.mark.parametrize("name", ["dora", "adalora", "shira", "gralora", "miss", "lora_bias"])
def test_a_family_is_the_largest_that_is_as_large_as_lora(layers, name, equal):
    """At most a twentieth larger; the next size is larger than that, or no layer can carry it."""
    family = FAMILIES[name]()
    sized = of_size(family, 8, layers, equal)
    budget = 1.05 * total(Lora(), 8, layers, equal)
    assert total(family, sized.rank, layers, equal) <= budget
    above = family.shapes  # sizes of blocks may not divide the next ones
    larger = []
    for rank in range(sized.rank + 1, 2 * sized.rank + 2):
        try:
            for layer in layers.values():
                above(layer.shape, rank)
        except ValueError:
            continue
        larger.append(total(family, rank, layers, equal))
    assert not larger or min(larger) > budget


def test_bytes_count_indices(layers):
    """An entry of SHiRA has two indices beside its value, of four bytes each."""
    numbers, size = (of_size(FAMILIES["shira"](), 12, layers, equal).rank for equal in ("numbers", "bytes"))
    assert numbers == 12
    assert size == 4


def test_families_of_defaults_and_unknown_ones(layers):
    (sized,) = ComparedFamilies(("lora", "dora"), "defaults").sized(4, layers)
    assert sized.title == "dora 16"
    with pytest.raises(ConfigurationError, match="Unknown family 'dore'"):
        ComparedFamilies(("dore",)).sized(4, layers)


@pytest.mark.slow
def test_rows_of_families(run, tiny_llama, tmp_path):
    """LoRA is always among them, and the rows join those in the folder, where they are found again."""
    fast = [
        "--samples",
        "4",
        "--sequence-length",
        "64",
        "--windows",
        "2",
        "--window-length",
        "32",
        "--baselines",
        "int8",
    ]
    arguments = ("compare", tiny_llama, "--out", tmp_path / "out", "--recipes", "qera-exact", "--ranks", "4", *fast)
    status, shown, errors = run(*arguments, "--families", "dora", "beft")
    assert status == 0, errors
    assert "qera-exact r4 dora 3" in shown
    assert "qera-exact r4 beft" in shown
    status, again, _ = run(*arguments, "--families", "miss", "shira", "vera")
    assert status == 0
    for name in ("dora 3", "beft", "miss"):
        assert f"qera-exact r4 {name}" in again
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    assert rows["qera-exact r4 dora 3"]["family"]["class_path"] == "dora"
    assert rows["qera-exact r4"]["family"] is None
    assert rows["qera-exact r4 dora 3"]["size"] == 3
    # An entry of SHiRA has 16 bits, and 32 for each of its two indices; both projections of VeRA are there once.
    shira, vera = (
        Row.from_dict(next(row for name, row in rows.items() if f" {family} " in name)) for family in ("shira", "vera")
    )
    assert shira.adapter_bytes == 10 * sum(layer.numbers for layer in shira.layers) / 3
    assert vera.adapter_bytes == 2 * (sum(layer.numbers for layer in vera.layers) + vera.size * (96 + 96))
    for row in rows.values():
        for layer in row["layers"]:
            assert layer["error"] <= layer["error_none"] * 1.001
    status, _, errors = run(*arguments, "--families", "hra")
    assert status == 1
    assert "There is no start for 'hra'" in errors


@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_that_layers_share_are_counted(layers, name):
    shapes, rank = {layer: each.shape for layer, each in layers.items()}, 6
    family = FAMILIES[name]()
    shared = sum(tensor.numel() for tensor in family.shared(shapes, rank).values())
    assert family.shared_numbers(shapes, rank) == shared
