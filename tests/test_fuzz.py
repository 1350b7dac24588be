"""A small draw of the fuzzer; `python tests/fuzz.py` makes a large one."""

from __future__ import annotations

import fuzz
import pytest
from fuzz_groups import GROUPS
from fuzz_shop import Shop

INPUTS = 4  # of each group


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shop:
    return Shop.furnish(tmp_path_factory.mktemp("shop"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", GROUPS)
def test_no_input_ends_in_a_traceback_or_a_wrong_result(shop, group, tmp_path):
    for number in range(INPUTS):
        verdict = fuzz.run(group, number, 0, shop, tmp_path)
        assert verdict.ending in {"refused", "right"}, verdict.told
