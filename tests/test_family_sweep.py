"""A draw of families, one for each kind of oddity, from checkpoint to stock PEFT; the sweep runs all of them."""

from __future__ import annotations

import pytest
from family_sweep import outcome

ODD = {
    "bamba": "ok",  # blocks return tuples of two
    "reformer": "ok",  # blocks return named tuples, and is run as a whole
    "xlnet": "ok",  # another order of axes
    "recurrent_gemma": "ok",  # recurrent blocks
    "glm4_moe": "left out",  # PEFT takes shared experts for fused ones
    "falcon_h1": "left out",  # PEFT refuses out_proj
    "bart": "left out",  # cross attention without an encoder
    "qwen2_moe": "left out",  # gates of one row; said as a lower rank
    "llama4_text": "left out",  # routers of their own class
    "falcon": "refused",  # linear layers of their own class
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_stock_peft_loads_what_init_writes(kind, tmp_path):
    found, line = outcome(kind, tmp_path)
    assert found == ODD[kind], line
