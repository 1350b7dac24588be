"""After training: adapters of three starts merged, and moved to other bases; `python -m experiments.after --help`.

Each job is one row of JSON, and jobs that are done are left out when the script runs again. `docs/after.md` has what
`draw` makes of the rows.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jsonargparse import auto_cli
from transformers import AutoTokenizer
from typing_extensions import override

from quailora import (
    GPTQ,
    NF4,
    Calibration,
    LoraScaling,
    Output,
    Resources,
    TextSource,
    initialize_model,
    merge,
    rebase,
)
from quailora.adapters.saved import SavedAdapter
from quailora.bases import ExistingBase
from quailora.calibration.walk import collect_statistics
from quailora.evaluation.texts import EvaluationTexts
from quailora.merging.trained_on import base_at
from quailora.merging.training import MergeTraining
from quailora.models.locate import resolve
from quailora.models.weights import replaced
from quailora.pipeline.fine_tuned import Target

from .after_jobs import BASES, FORMATS, PARTS, jobs
from .after_scores import STARTS, Adapter, Scorer, Weights
from .after_stock import quantize_by_gptqmodel
from .after_tables import draw
from .arms import Arm
from .data import write_training_pairs
from .jobs import Jobs
from .protocol import PROTOCOLS, Protocol, Run
from .runs import RESULTS, Store
from .training import model_of, train

logger = logging.getLogger("experiments")


class After(Jobs):
    """What merging and moving trained adapters costs.

    Args:
        texts: folder with the instruction pairs and the WikiText-2 test set.
        folder: folder of starts and trained adapters, as `python -m experiments` has left them.
        results: folder of the results.
        device: what computes.
        protocol: the protocol of the adapters.
    """

    def __init__(
        self,
        texts: Path = Path("texts"),
        folder: Path = Path("runs"),
        results: Path = RESULTS,
        device: str = "auto",
        protocol: str = "reference",
    ) -> None:
        self._protocol: Protocol = PROTOCOLS[protocol]
        self._texts, self._bench, self._device = texts, folder / self._protocol.name, device
        super().__init__(Store(self._protocol, results, "after"), self._bench / "after")

    def draw(self, page: Path = Path("docs/after.md")) -> None:
        """Write the tables into the documentation.

        Args:
            page: the page.
        """
        draw(self._store.rows(), page)

    @override
    def _jobs(self) -> list[str]:
        return jobs()

    @override
    def _row(self, job: str) -> dict[str, Any] | None:
        """Carry out a job, and return its row; a job that cannot be carried out yet is left for the next time."""
        start = time.monotonic()
        try:
            row = self._carry_out(job)
        except (FileNotFoundError, ImportError) as error:
            logger.warning("%s waits: %s", job, error)
            return None
        seconds = time.monotonic() - start
        end = AutoTokenizer.from_pretrained(resolve(self._protocol.model)).eos_token_id
        logger.warning("%s: %.0f s", job, seconds)
        return {**row, "end": end, "wall": round(seconds, 1)}

    def _carry_out(self, job: str) -> dict[str, Any]:
        kind, *parts = job.split("/")
        if kind in {"start", "again"}:
            number = int(parts[1]) if len(parts) > 1 else 16
            return self._started(parts[0], number) if kind == "start" else self._trained_again(parts[0], number)
        adapter = self._adapter(*parts[:2])
        # With the hash of the adapter, so that rows of different trainings are not mixed.
        return {**self._about(kind, adapter, parts[2:]), "adapter": SavedAdapter.read(adapter.folder).digest}

    def _about(self, kind: str, adapter: Adapter, rest: list[str]) -> dict[str, Any]:
        if kind == "reference":
            return self._reference(adapter)
        if kind == "gptqmodel":
            return self._by_gptqmodel(adapter)
        if kind == "rebase":
            return self._rebased(adapter, rest[0], int(rest[1]))
        if kind == "part":
            return self._merged(adapter, rest[0], "trained", PARTS[rest[1]])
        if kind == "mixed":
            return self._merged(adapter, rest[0], "trained", MergeTraining(), mixed=True)
        return self._merged(adapter, rest[0], "full" if rest[1] == "full" else "trained", MergeTraining())

    def _adapter(self, arm: str, seed: str) -> Adapter:
        adapter = Adapter(arm, int(seed), self._bench)
        if not (adapter.folder / "adapter_config.json").is_file():
            raise FileNotFoundError(adapter.folder)
        return adapter

    def _reference(self, adapter: Adapter) -> dict[str, Any]:
        """Score the unmerged model, the full-precision merges, and what people do otherwise."""
        scorer = self._scorer()
        unmerged, full = scorer.unmerged(adapter), scorer.full(adapter)
        variants: dict[str, Weights] = {"full": full}
        for name, (_, nearest) in FORMATS.items():
            variants[f"rounded {name}"] = {key: nearest.quantize(one).dequantize() for key, one in unmerged.items()}
        if adapter.seed == 0:  # these take as long as all the others together
            for name, (_, nearest) in FORMATS.items():
                rounded = {key: nearest.quantize(one).dequantize() for key, one in full.items()}
                variants[f"full, rounded {name}"] = rounded
            with torch.no_grad(), replaced(scorer.layers, full):
                seen = collect_statistics(scorer.model, scorer.layers, scorer.data.windows[:128])
            published = GPTQ(shrinkage=0.0, damping_scale="mean")
            variants["full, GPTQ"] = {key: published.quantize(one, seen[key]).dequantize() for key, one in full.items()}
        return {"scores": scorer.scores(unmerged, variants, "unmerged")}

    def _merged(
        self, adapter: Adapter, name: str, target: Target, training: MergeTraining, *, mixed: bool = False
    ) -> dict[str, Any]:
        scorer = self._scorer()
        steps = f"{training.blocks.steps}-{training.scales.steps}"
        out = self._folder / f"merge-{adapter.arm}-{adapter.seed}-{name}-{target}-{steps}{'-mixed' * mixed}"
        began = time.monotonic()
        merge(
            adapter.folder,
            FORMATS[name][0],
            out=Output(out, overwrite=True),
            initial=adapter.initial,
            model=self._protocol.model,
            trained_on=NF4(),
            target=target,
            calibration=self._calibration(mixed=mixed),
            texts=EvaluationTexts(windows=0),
            training=training,
            resources=self._resources(),
        )
        seconds = time.monotonic() - began
        scores = scorer.scores(scorer.unmerged(adapter), {"merged": scorer.of_base(base_at(out))})
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        return {"scores": scores, "seconds": round(seconds, 1), "bytes": size}

    def _by_gptqmodel(self, adapter: Adapter) -> dict[str, Any]:
        """Score what people do today: the full-precision merge, quantized by gptqmodel."""
        folder = self._folder / f"gptqmodel-{adapter.arm}-{adapter.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        pairs = [json.loads(line)["text"] for line in self._calibration_file().read_text(encoding="utf-8").splitlines()]
        seconds = quantize_by_gptqmodel(adapter, self._protocol.model, "\n\n".join(pairs), folder)
        scorer = self._scorer()
        scores = scorer.scores(scorer.unmerged(adapter), {"gptqmodel": scorer.of_base(base_at(folder / "out"))})
        shutil.rmtree(folder)
        return {"scores": scores, "seconds": round(seconds, 1)}

    def _started(self, name: str, rank: int) -> dict[str, Any]:
        """Make a base with its own compensation, and score it beside the full-precision model."""
        scorer, place = self._scorer(), self._start(name, rank)
        start = scorer.on(self._base(name, rank), place)
        return {"scores": scorer.scores(scorer.own(), {"start": start}, "full")}

    def _rebased(self, adapter: Adapter, name: str, rank: int) -> dict[str, Any]:
        scorer, out = self._scorer(), self._folder / f"rebase-{adapter.arm}-{adapter.seed}-{name}-{rank}"
        began = time.monotonic()
        rebase(  # which makes the same base as a start on it, bit for bit
            adapter.folder,
            out=Output(out, overwrite=True, save_base=True, base_format="dequantized"),
            initial=adapter.initial,
            base=BASES[name],
            model=self._protocol.model,
            rank=rank,
            calibration=self._calibration(),
            resources=self._resources(),
        )
        seconds = time.monotonic() - began
        variants = {"rebased": scorer.on(base_at(out / "base"), out), "full": scorer.full(adapter)}
        scores = scorer.scores(scorer.unmerged(adapter), variants, "unmerged")
        shutil.rmtree(out)
        return {"scores": scores, "seconds": round(seconds, 1)}

    def _trained_again(self, name: str, seed: int) -> dict[str, Any]:
        """Train on the other base from its own compensation, as the adapters were trained on NF4."""
        scorer, place = self._scorer(), self._start(name)
        run, arm = Run("best", 16, STARTS["best"], seed), Arm(name, "own", "best")
        base = place
        model = model_of(run, arm, base, self._protocol)
        began = time.monotonic()
        train(model, run, arm, scorer.data, self._protocol, self._folder / f"again-{name}-{seed}")
        seconds = time.monotonic() - began
        out = self._folder / f"trained-{name}-{seed}"
        model.save_pretrained(out)
        shutil.rmtree(self._folder / f"again-{name}-{seed}", ignore_errors=True)
        scores = scorer.scores(scorer.own(), {"trained again": scorer.on(self._base(name), out)})
        return {"scores": scores, "seconds": round(seconds, 1)}

    def _start(self, name: str, rank: int = 16) -> Path:
        """Return the folder of a base, in floating point, with its own compensation, made once."""
        place = self._folder / f"start-{name}-{rank}"
        with FileLock(f"{place}.lock"):
            if not place.exists():
                written = Output(place, save_base=True, base_format="dequantized")
                initialize_model(
                    self._protocol.model,
                    "best",
                    self._calibration(),
                    scaling=LoraScaling(rank),
                    base=BASES[name],
                    out=written,
                    resources=self._resources(),
                )
        return place

    def _base(self, name: str, rank: int = 16) -> ExistingBase:
        return base_at(self._folder / f"start-{name}-{rank}" / "base")

    def _calibration(self, *, mixed: bool = False) -> Calibration:
        """Return the text of the training pairs, of which codes and scales are trained on other windows.

        Args:
            mixed: with as much text from the web among it.
        """
        source = TextSource(str(self._calibration_file(mixed=mixed)))
        return Calibration(source, self._protocol.calibration_windows, self._protocol.length)

    def _calibration_file(self, *, mixed: bool = False) -> Path:
        file = self._folder / ("mixed.jsonl" if mixed else "pairs.jsonl")
        if not file.exists():
            write_training_pairs(self._texts, self._protocol, file, mixed=mixed)
        return file

    def _resources(self) -> Resources:
        return Resources(device="auto" if self._device == "auto" else "cpu")

    def _scorer(self) -> Scorer:
        return Scorer.of(self._protocol, self._texts, "cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    auto_cli(After, as_positional=False)
    sys.exit(0)
