"""What can be done with an adapter that was just written: commands and code with its real paths."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from textwrap import indent

from ..adapters.provenance import Provenance, read_provenance
from ..pipeline.card import BESIDE


def next_steps(adapter: Path) -> str:
    """Return the commands that measure and check an adapter, and the code that loads it for training.

    Args:
        adapter: folder that `init` wrote.
    """
    folder = shlex.quote(str(adapter))
    measure, compare = commands(adapter, read_provenance(adapter))
    return (
        f"What comes next:\n\nMeasure it on a text of your task:\n  {measure}\n\n"
        f"Compare its base with the one that it was made for:\n  {compare}\n\n"
        f"Load it for training ({folder}/README.md says more):\n\n{indent(loading_code(adapter), '  ')}"
    )


def commands(adapter: Path, provenance: Provenance) -> tuple[str, str]:
    """Return the commands that measure an adapter, and that compare its base with the one that it was made for.

    Args:
        adapter: folder of the adapter.
        provenance: what the adapter's folder says about its base.
    """
    origin = provenance.origin
    assert origin is not None  # `init` has just noted it
    own = adapter / "base"
    place = str(own) if own.is_dir() else origin.checkpoint or (origin.model if origin.needs == "model" else "BASE")
    evaluate = ["quailora", "evaluate", origin.model, "--adapter", str(adapter)]
    check = ["quailora", "check", str(adapter), "--base", place]
    if place == "BASE":
        evaluate += ["--base", place] if origin.needs == "base" else []
        text = provenance.calibration.get("text", {}).get("source")
        evaluate += ["--calibration", text] if text and origin.needs == "calibration" else []
    module = str(origin.quantizer.get("class_path", "")).rpartition(".")[0]
    plugin = ["--plugin", module] if module else []  # of a class that is not ours
    return shlex.join([*evaluate, *plugin, "--text", "TEXT"]), shlex.join([*check, *plugin])


def loading_code(adapter: Path) -> str:
    """Return the code on the card of an adapter, with the folder of the adapter in place of what stands for it."""
    card = (adapter / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    return code[1].replace(BESIDE, str(adapter)) if code else ""
