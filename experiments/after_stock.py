"""What people do today after training: the full-precision merge, quantized by gptqmodel."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from quailora import merge_full

from .after_scores import Adapter


def quantize_by_gptqmodel(adapter: Adapter, model: str, text: str, folder: Path) -> float:
    """Merge an adapter in full precision and let gptqmodel quantize the result, in an environment of its own.

    Args:
        adapter: the trained adapter.
        model: the full-precision model.
        text: what gptqmodel calibrates on.
        folder: an empty folder; the quantized model is in `out` in it then.

    Returns:
        Seconds that gptqmodel took.

    Raises:
        FileNotFoundError: if nothing says where that environment is.
    """
    python = os.environ.get("QUAILORA_STOCK")
    if python is None:
        raise FileNotFoundError("the interpreter of `make stock`, in the variable QUAILORA_STOCK")
    merge_full([adapter.folder], out=folder / "full", initial=adapter.initial, model=model)
    (folder / "pairs.txt").write_text(text, encoding="utf-8")
    script = Path(__file__).parents[1] / "benchmarks" / "stock_quantize.py"
    command = [python, script, folder / "full", folder / "out", "--text", folder / "pairs.txt", "--samples", "64"]
    began = time.monotonic()
    absolute = [str(part.absolute()) if isinstance(part, Path) else part for part in command]
    # gptqmodel refuses to load a model with the number of workers that it takes on a machine of two cores.
    subprocess.run(absolute, env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}, check=True)
    return time.monotonic() - began
