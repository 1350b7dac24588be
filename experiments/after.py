"""After training: adapters of three starts merged, and moved to other bases; `python -m experiments.after --help`.

Each job is one row of JSON, and jobs that are done are left out when the script runs again. `docs/after.md` has what
`draw` makes of the rows.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jsonargparse import auto_cli
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from quailora import (
    GPTQ,
    HQQ,
    NF4,
    Calibration,
    Int8,
    LoraScaling,
    Output,
    Quantizer,
    Resources,
    TextSource,
    Uniform,
    initialize_model,
    merge,
    rebase,
)
from quailora.adapters.change import TrainedChange, family_of_saved
from quailora.adapters.saved import SavedAdapter
from quailora.bases import ExistingBase
from quailora.bases.fresh import FreshBase
from quailora.calibration.walk import collect_statistics
from quailora.evaluation.texts import EvaluationTexts
from quailora.merging.scales import ScaleTraining
from quailora.merging.trained_on import base_at
from quailora.models.layers import Layer, linear_layers
from quailora.models.load import load_model
from quailora.models.locate import resolve
from quailora.models.weights import replaced

from .after_tables import draw
from .arms import ARMS, Arm
from .data import Data, load_data, write_training_pairs
from .protocol import PROTOCOLS, Protocol, Run
from .runs import RESULTS, Store
from .starts import start_place
from .training import model_of, train

logger = logging.getLogger("experiments")

STARTS = {"qlora": 3.2e-3, "quailora": 1.6e-3, "best": 1.6e-3}
"""Arms whose adapters are merged and moved, with the learning rate of each."""

FORMATS: dict[str, tuple[Quantizer, Quantizer]] = {"nf4": (NF4(), NF4()), "gptq": (GPTQ(), Uniform())}
"""What adapters are merged into, and rounding to nearest in the same format."""

BASES: dict[str, Quantizer] = {"gptq4": GPTQ(), "gptq3": GPTQ(bits=3), "hqq4": HQQ(), "int8": Int8()}
"""What adapters are moved to."""

RANKS = (16, 32)

TUNED = (("gptq", 100, 5e-3), ("gptq", 300, 3e-3), ("nf4", 100, 5e-3))
"""Other trainings of scales than the default, to see whether they are better: format, steps and rate."""

_ROWS = 8  # sequences whose predictions are kept at a time

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """A trained adapter of the experiment.

    Attributes:
        arm: name of its arm.
        seed: seed of its training.
        bench: the folder of starts and adapters.
    """

    arm: str
    seed: int
    bench: Path

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.bench / "adapters" / Run(self.arm, 16, STARTS[self.arm], self.seed).key

    @property
    def initial(self) -> Path | str:
        """Where its start is; "zero" for plain LoRA."""
        place = start_place(ARMS[self.arm], 16, "train", self.bench / "starts")
        return "zero" if place is None else place


class After:
    """What merging and moving trained adapters costs.

    Args:
        texts: folder with the instruction pairs and the WikiText-2 test set.
        folder: folder of starts and trained adapters, as `python -m experiments` has left them.
        results: folder of the results.
        device: what computes.
    """

    def __init__(
        self, texts: Path = Path("texts"), folder: Path = Path("runs"), results: Path = RESULTS, device: str = "auto"
    ) -> None:
        self._protocol: Protocol = PROTOCOLS["reference"]
        self._texts, self._bench, self._device = texts, folder / self._protocol.name, device
        self._store = Store(self._protocol, results, "after")
        self._work = self._bench / "after"

    def left(self) -> None:
        """Print the jobs that are left."""
        print("\n".join(job for job in jobs() if job not in {row["key"] for row in self._store.rows()}))

    def draw(self, page: Path = Path("docs/after.md")) -> None:
        """Write the tables into the documentation.

        Args:
            page: the page.
        """
        draw(self._store.rows(), page)

    def run(self, only: str = "", seconds: float = 1e9) -> None:
        """Carry out the jobs that are left, except for those that another process is at.

        Args:
            only: jobs whose names begin so.
            seconds: after which no further job is begun.
        """
        began = time.monotonic()
        self._work.mkdir(parents=True, exist_ok=True)
        for job in jobs():
            if not job.startswith(only) or job in {row["key"] for row in self._store.rows()}:
                continue
            lock = FileLock(self._work / f"job-{job.replace('/', '-')}.lock")
            if time.monotonic() - began > seconds or not acquired(lock):
                continue
            try:
                if job not in {row["key"] for row in self._store.rows()}:
                    self._keep(job)
            finally:
                lock.release()

    def _keep(self, job: str) -> None:
        """Carry out a job and keep its row; a job that cannot be carried out yet is left for the next time."""
        start = time.monotonic()
        try:
            row = self._carry_out(job)
        except (FileNotFoundError, ImportError) as error:
            logger.warning("%s waits: %s", job, error)
            return
        seconds = time.monotonic() - start
        self._store.add({"key": job, **row, **self._adapter_of(job), "wall": round(seconds, 1)})
        logger.warning("%s: %.0f s", job, seconds)

    def _carry_out(self, job: str) -> dict[str, Any]:
        kind, *parts = job.split("/")
        if kind == "reference":
            return self._reference(self._adapter(*parts))
        if kind == "merge":
            return self._merged(self._adapter(*parts[:2]), parts[2], parts[3], ScaleTraining())
        if kind == "tune":
            training = ScaleTraining(int(parts[3]), learning_rate=float(parts[4]))
            return self._merged(self._adapter(*parts[:2]), parts[2], "trained", training)
        if kind == "start":
            return self._started(parts[0], int(parts[1]) if len(parts) > 1 else 16)
        if kind == "rebase":
            return self._rebased(self._adapter(*parts[:2]), parts[2], int(parts[3]))
        return self._trained_again(parts[0], int(parts[1]))

    def _adapter_of(self, job: str) -> dict[str, str]:
        """Return the hash of the adapter that a job is about, so that rows of different trainings are not mixed."""
        kind, *parts = job.split("/")
        if kind in {"start", "again"}:
            return {}
        return {"adapter": SavedAdapter.read(self._adapter(*parts[:2]).folder).digest}

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

    def _merged(self, adapter: Adapter, name: str, target: str, training: ScaleTraining) -> dict[str, Any]:
        scorer = self._scorer()
        out = (
            self._work / f"merge-{adapter.arm}-{adapter.seed}-{name}-{target}-{training.steps}-{training.learning_rate}"
        )
        began = time.monotonic()
        merge(
            adapter.folder,
            FORMATS[name][0],
            out=Output(out, overwrite=True),
            initial=adapter.initial,
            model=self._protocol.model,
            trained_on=NF4(),
            target="trained" if target == "trained" else "full",
            calibration=self._calibration(),
            texts=EvaluationTexts(windows=0),
            training=training,
            resources=self._resources(),
        )
        seconds = time.monotonic() - began
        base = base_at(out)
        found = {key: scorer.stored(base, layer) for key, layer in scorer.layers.items()}
        scores = scorer.scores(scorer.unmerged(adapter), {"merged": found})
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shutil.rmtree(out)
        return {"scores": scores, "seconds": round(seconds, 1), "bytes": size}

    def _started(self, name: str, rank: int) -> dict[str, Any]:
        """Make a base with its own compensation, and score both."""
        scorer, place = self._scorer(), self._start(name, rank)
        base = self._base(name, rank)
        alone = {key: scorer.stored(base, layer) for key, layer in scorer.layers.items()}
        scores = scorer.scores(scorer.own(), {"base": alone, "start": scorer.on(base, place)}, "full")
        return {"scores": scores}

    def _rebased(self, adapter: Adapter, name: str, rank: int) -> dict[str, Any]:
        scorer, out = self._scorer(), self._work / f"rebase-{adapter.arm}-{adapter.seed}-{name}-{rank}"
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
        scores = scorer.scores(scorer.unmerged(adapter), {"rebased": scorer.on(base_at(out / "base"), out)})
        shutil.rmtree(out)
        return {"scores": scores, "seconds": round(seconds, 1)}

    def _trained_again(self, name: str, seed: int) -> dict[str, Any]:
        """Train on the other base from its own compensation, as the adapters were trained on NF4."""
        scorer, place = self._scorer(), self._start(name)
        run, arm = Run("best", 16, STARTS["best"], seed), Arm(name, "own", "best")
        base = place
        model = model_of(run, arm, base, self._protocol)
        began = time.monotonic()
        train(model, run, arm, scorer.data, self._protocol, self._work / f"again-{name}-{seed}")
        seconds = time.monotonic() - began
        out = self._work / f"trained-{name}-{seed}"
        model.save_pretrained(out)
        shutil.rmtree(self._work / f"again-{name}-{seed}", ignore_errors=True)
        scores = scorer.scores(scorer.own(), {"trained again": scorer.on(self._base(name), out)})
        return {"scores": scores, "seconds": round(seconds, 1)}

    def _start(self, name: str, rank: int = 16) -> Path:
        """Return the folder of a base, in floating point, with its own compensation, made once."""
        place = self._work / f"start-{name}-{rank}"
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
        return base_at(self._work / f"start-{name}-{rank}" / "base")

    def _calibration(self) -> Calibration:
        """Return the text of the training pairs, of which codes and scales are trained on other windows."""
        file = self._work / "pairs.jsonl"
        if not file.exists():
            write_training_pairs(self._texts, self._protocol, file)
        return Calibration(TextSource(str(file)), self._protocol.calibration_windows, self._protocol.length)

    def _resources(self) -> Resources:
        return Resources(device="auto" if self._device == "auto" else "cpu")

    def _scorer(self) -> Scorer:
        return Scorer.of(self._protocol, self._texts, "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, eq=False)
class Scorer:
    """Scores weights of a model on the held-out pairs and on WikiText-2, in float32.

    Attributes:
        model: the full-precision model.
        layers: its linear layers.
        data: the texts.
        device: where it is.
    """

    model: Any
    layers: dict[str, Layer]
    data: Data
    device: str

    @classmethod
    def of(cls, protocol: Protocol, texts: Path, device: str) -> Scorer:
        """Load the model and the texts."""
        loaded = load_model(protocol.model, "float32", "cuda" if device == "cuda" else "cpu")
        tokenizer = AutoTokenizer.from_pretrained(resolve(protocol.model))
        return cls(loaded.model, linear_layers(loaded.model), load_data(texts, tokenizer, protocol), device)

    def own(self) -> Weights:
        """Return the weights of the full-precision model."""
        return {name: layer.weight.clone() for name, layer in self.layers.items()}

    def stored(self, base: ExistingBase, layer: Layer) -> Tensor:
        """Return the weight of a layer in a base."""
        return base.weight_of(layer).dequantize()

    def unmerged(self, adapter: Adapter) -> Weights:
        """Return what the unmerged model computes with: NF4 with the trained adapter."""
        return self.on(FreshBase("demo", NF4()), adapter.folder)

    def on(self, base: ExistingBase, folder: Path) -> Weights:
        """Return what an adapter makes of a base."""
        change = effect_of(folder)
        layers = change.layers(self.layers)
        return {
            name: change.effective(layer, layers, self.stored(base, layer)).to(self.device)
            for name, layer in layers.items()
        }

    def full(self, adapter: Adapter) -> Weights:
        """Return the full-precision weights with what training has changed."""
        change = TrainedChange.read(adapter.folder, adapter.initial)
        layers = change.layers(self.layers)
        return {name: layer.weight + change.of(layer, layers).to(self.device) for name, layer in layers.items()}

    @torch.inference_mode()
    def scores(
        self, reference: Weights, variants: Mapping[str, Weights], own: str = ""
    ) -> dict[str, dict[str, list[float]]]:
        """Return losses of each variant, and divergences from the reference, pair by pair and window by window.

        Args:
            reference: weights of the reference.
            variants: weights of each variant.
            own: name under which the reference is among the results, if it is to be.
        """
        rows = [pair.ids for pair in self.data.held_out] + list(self.data.wikitext)
        names = [*variants, *filter(None, [own])]
        found: dict[str, dict[str, list[float]]] = {name: {"loss": [], "kl": []} for name in names}
        for part in parts(rows):
            with replaced(self.layers, reference):
                expected = [self._predict(ids) for ids in part]
            for ids, log_p in zip(part, expected, strict=True) if own else ():
                loss = functional.nll_loss(log_p, ids[1:].to(self.device)).item()
                found[own]["loss"].append(round(loss, 5))
                found[own]["kl"].append(0.0)
            for name, weights in variants.items():
                with replaced(self.layers, weights):
                    for ids, log_p in zip(part, expected, strict=True):
                        log_q = self._predict(ids)
                        loss = functional.nll_loss(log_q, ids[1:].to(self.device)).item()
                        apart = functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item() / len(log_q)
                        found[name]["loss"].append(round(loss, 5))
                        found[name]["kl"].append(round(apart, 6))
        pairs = len(self.data.held_out)
        return {
            name: {
                "pairs": one["loss"][:pairs],
                "wikitext2": one["loss"][pairs:],
                "pairs kl": one["kl"][:pairs],
                "wikitext2 kl": one["kl"][pairs:],
            }
            for name, one in found.items()
        }

    def _predict(self, ids: Tensor) -> Tensor:
        # In float32 a CPU takes a minute for each variant and bfloat16 moves a divergence by a few thousandths.
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cpu"):
            logits: Tensor = self.model(input_ids=ids[None].to(self.device), use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1)


def effect_of(folder: Path) -> TrainedChange:
    """Return an adapter whose effective weights are asked for, whatever it started from."""
    saved = SavedAdapter.read(folder)
    return TrainedChange(saved, None, *family_of_saved(saved))


def parts(rows: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Yield a few sequences at a time."""
    for start in range(0, len(rows), _ROWS):
        yield rows[start : start + _ROWS]


def acquired(lock: FileLock) -> bool:
    """Return whether a lock was free, and take it."""
    from filelock import Timeout

    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def jobs() -> list[str]:
    """Return the names of all jobs, most important first."""
    seeds = PROTOCOLS["reference"].seeds
    adapters = [f"{arm}/{seed}" for seed in seeds for arm in reversed(STARTS)]
    merges = [f"merge/{one}/{name}/trained" for one in adapters for name in FORMATS]
    return [
        *(f"tune/best/0/{name}/{steps}/{rate}" for name, steps, rate in TUNED),
        *merges,
        *(f"start/{name}" for name in BASES),
        *(f"again/{name}/{seed}" for seed in seeds for name in BASES),
        *(f"start/{name}/32" for name in BASES),
        *(f"rebase/best/{seed}/{name}/{rank}" for seed in seeds for rank in RANKS for name in BASES),
        *(f"reference/{one}" for one in adapters),
        *(f"merge/{one}/nf4/full" for one in adapters),
        *(f"rebase/{arm}/{seed}/{name}/32" for seed in seeds for arm in ("qlora", "quailora") for name in BASES),
    ]


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    auto_cli(After, as_positional=False)
    sys.exit(0)
