"""The main job on the embedded model: an adapter, and a comparison of three methods at two ranks."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path

from ..calibration.windows import Calibration
from ..comparison.compare import compare
from ..comparison.table import Comparison
from ..evaluation.texts import EvaluationTexts
from ..pipeline.initialize_model import initialize_model
from ..pipeline.options import Output
from ..support.choices import StrPath
from .initializing import InitResult

_SAMPLES, _LENGTH = 8, 512


def demo(out: StrPath | None = None) -> Comparison:
    """Initialize an adapter for SmolLM2-135M, and compare methods and ranks on text that ships with quailora.

    The uncalibrated SVD, QuAILoRA and the optimum on NF4, at ranks 16 and 64, with full precision and int8 beside them.
    Both calibrate and measure on short windows, so that it takes some minutes on two cores.

    Args:
        out: folder for the adapter and the comparison; nothing is kept by default.
    """
    # One adapter first, so that the report of a layer and the way to load it can be seen; then three methods on the
    # same text.
    with nullcontext(out) if out else tempfile.TemporaryDirectory() as folder:
        output = Output(Path(folder) / "adapter", overwrite=True)
        source = Calibration(samples=_SAMPLES, sequence_length=_LENGTH)
        result = initialize_model("demo", "qera-exact", source, out=output)
        shown = InitResult(Path(output.folder), result.report)
        if out:
            shown.show()
        elif result.report is not None:  # what comes next would name a folder that is gone by then
            shown.show_errors(result.report)
        return compare(
            "demo",
            ("lorc", "quailora", "qera-exact"),
            source,
            out=Path(folder) / "comparison",
            ranks=(16, 64),
            baselines=("int8",),
            texts=EvaluationTexts(windows=8, window_length=_LENGTH),
        )
