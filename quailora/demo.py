"""The main job on the embedded model: methods and ranks side by side, in perplexity."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from jaxtyping import Int
from torch import Tensor

from .adapters.lora import LoraScaling
from .calibration import Calibration, evaluation_windows, shipped_text
from .evaluate import Perplexity, adapted, perplexity, quantized
from .initializer import Initializer
from .layerwise import Method, run_methods
from .models.layers import linear_layers
from .models.load import LoadedModel, load_model
from .models.stream import Walk
from .outputs import write_json
from .quantizers import NF4, Int8
from .report.record import LayerRecord
from .report.tables import print_table
from .results import write_adapter
from .solvers import SVD, AlternatingLeastSquares, Optimal, Solver

SOLVERS: dict[str, Solver] = {"SVD": SVD(), "QuAILoRA": AlternatingLeastSquares(), "Optimal": Optimal()}


@final
@dataclass(frozen=True)
class Comparison:
    """Perplexities of one model under several initializations.

    Attributes:
        title: what was compared on what.
        results: one entry a row: "full precision", "int8", "nf4", "nf4 + SVD r16", ...
        layers: errors of every layer, for the rows that have an adapter.
    """

    title: str
    results: Mapping[str, Perplexity]
    layers: Mapping[str, Sequence[LayerRecord]]

    def gap_closed(self, name: str) -> float:
        """Return the share of the NF4-to-int8 gap in perplexity that a row closes."""
        worst, best = self.results["nf4"].perplexity, self.results["int8"].perplexity
        return (worst - self.results[name].perplexity) / (worst - best)

    def rows(self) -> list[list[str]]:
        """Return the table: row, perplexity, and for adapters the share of the gap closed."""
        table = []
        for name, result in self.results.items():
            gap = f"{self.gap_closed(name):.1%}" if name in self.layers else ""
            table.append([name, f"{result.perplexity:.3f}", gap])
        return table

    def show(self) -> None:
        """Print the table."""
        print_table(self.title, ("weights", "perplexity", "of the NF4-int8 gap closed"), self.rows())


def demo(out: str | None = None) -> Comparison:
    """Initialize and evaluate adapters for SmolLM2-135M, on text that ships with quailora.

    Full precision, int8, NF4, and NF4 with adapters from the uncalibrated SVD, QuAILoRA and the optimum, at ranks 16
    and 64. Takes some minutes on two cores.

    Args:
        out: folder for the adapters and the table as results.json; nothing is kept by default.
    """
    loaded = load_model("demo")
    windows = evaluation_windows(loaded.tokenizer, [shipped_text("evaluate")], 4, 2048)
    with nullcontext(out) if out else tempfile.TemporaryDirectory() as folder:
        return compare(loaded, Calibration(), windows, Path(str(folder)), title="SmolLM2-135M on the shipped text")


def compare(
    loaded: LoadedModel,
    calibration: Calibration,
    windows: Int[Tensor, "windows sequence_length"],
    folder: Path,
    *,
    title: str,
    ranks: Sequence[int] = (16, 64),
) -> Comparison:
    """Compare full precision, int8, NF4, and NF4 with an adapter from each solver at each rank.

    Args:
        loaded: the model.
        calibration: what to calibrate on.
        windows: what to evaluate on.
        folder: gets one adapter a row, and `results.json`.
        title: of the table.
        ranks: ranks of the adapters.
    """
    model = loaded.model
    layers = linear_layers(model)
    walk = Walk(model, layers, calibration.windows(loaded.tokenizer), dtype=calibration.dtype)
    results = {"full precision": perplexity(model, windows, "Full precision")}
    with quantized(model, Int8()):
        results["int8"] = perplexity(model, windows, "int8")
    methods = {
        f"nf4 + {label} r{rank}": Method(Initializer(NF4(), solver), LoraScaling(rank))
        for rank in ranks
        for label, solver in SOLVERS.items()
    }
    adapters = {name: folder / name.removeprefix("nf4 + ").lower().replace(" ", "-") for name in methods}
    solved = run_methods(walk, methods, len(layers))
    for name, result in solved.items():
        adapters[name].mkdir(parents=True, exist_ok=True)
        write_adapter(adapters[name], loaded, layers, result.corrections, methods[name].scaling)
    with quantized(model, NF4()):
        results["nf4"] = perplexity(model, windows, "nf4")
        for name, adapter in adapters.items():
            with adapted(model, adapter) as wrapped:
                results[name] = perplexity(wrapped, windows, name)
    records = {name: result.records for name, result in solved.items()}
    comparison = Comparison(title, results, records)
    write_json(folder / "results.json", results_as_data(comparison))
    return comparison


def results_as_data(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON can hold it."""
    return {
        "title": comparison.title,
        "results": {name: asdict(result) for name, result in comparison.results.items()},
        "gap_closed": {name: comparison.gap_closed(name) for name in comparison.layers},
        "layers": {name: [asdict(layer) for layer in layers] for name, layers in comparison.layers.items()},
    }
