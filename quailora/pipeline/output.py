"""Write what a finished run leaves: adapter, base, report, provenance, model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, final

import yaml

from ..adapters.lora import expert_stacks, write_lora
from ..adapters.modules import find_modules, tensors_to_save
from ..adapters.provenance import Origin, read_provenance
from ..adapters.written import check_files
from ..bases.writer import savable, save_packed
from ..calibration.windows import Calibration
from ..methods.method import Method
from ..models.layers import Layer, explicit_targets
from ..models.load import LoadedModel, save_model
from ..models.weights import replace_for_good
from ..quantizers.identity import BaseIdentity
from ..support.files import write_json
from ..support.phases import Phases
from ..support.settings import describe
from .card import BESIDE, model_card
from .checkpoint import Outcome
from .report import build_report, versions
from .run import Run

_OF_ONE_RUN = {"out", "overwrite", "fresh", "dry_run", "push_to_hub"}  # not worth repeating
BaseFormat = Literal["auto", "dequantized"]


@final
@dataclass(frozen=True, eq=False)
class Results:
    """Everything that goes into an output folder.

    Attributes:
        settings: what was asked for.
        phases: what it took.
        loaded: the model.
        method: how layers were initialized.
        source: what was calibrated on.
        layers: the layers with a correction.
        tokens: calibration tokens.
        run: the finished run.
        empty: the model without weights.
        base: the checkpoint that the adapter is for, if it was there before; else that of the model, once quantized.
    """

    settings: Mapping[str, Any]
    phases: Phases
    loaded: LoadedModel
    method: Method
    source: Calibration
    layers: Mapping[str, Layer]
    tokens: int
    run: Run
    empty: Any
    base: str | None = None

    def write(self, folder: Path, base_format: BaseFormat | None) -> dict[str, Any]:
        """Write all files; return the report.

        Tensors of finished layers are memory-mapped and written from there.

        Args:
            folder: to write to.
            base_format: of the base; None writes none.
        """
        outcomes = self.run.outcomes("", self.method.polish)
        records = [outcome.record for outcome in outcomes.values() if outcome.record is not None]
        corrections = {name: outcome.correction for name, outcome in outcomes.items() if outcome.correction is not None}
        with self.phases.measure("write"):
            base = {record.name: record.base for record in records if record.base is not None}
            origin = self._origin(base)
            names: Sequence[str] = self.settings["modules_to_save"]
            modules = tensors_to_save(find_modules(self.loaded.model, names, self.layers))
            write_lora(
                folder,
                corrections,
                self.method.scaling,
                target_modules=explicit_targets(self.loaded.model, self.layers),
                base_model=self.base or self.loaded.name,
                experts=expert_stacks(self.layers),
                origin=origin,
                modules=modules,
                modules_to_save=names,
            )
            check_files(folder, self.empty, self.layers, corrections, self.method.scaling, modules)
            if base_format is not None:
                self._write_base(folder / "base", outcomes, base_format)
        report = build_report(self.settings, self.phases.entries, records, self.tokens, self.run.seconds)
        report["training"] = describe(self.method.polish)
        self._write_provenance(folder, report, base)
        card = model_card(
            self.method.initializer,
            records,
            model=self.settings["model"],
            base_model=self.base or self.loaded.name,
            calibration_tokens=self.tokens,
            inputs=self.run.walk.inputs,
            quantized_base=f"{BESIDE}/base" if base_format else self.base,
            recipe=self.settings["recipe"],
            polish=self.method.polish,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        return report

    def _write_base(self, folder: Path, outcomes: Mapping[str, Outcome], base_format: BaseFormat) -> None:
        """Write the base: packed, where transformers reads its format, else dequantized."""
        layers = self.run.layers
        packed = {name: outcome.packed for name, outcome in outcomes.items()}
        if base_format == "auto" and savable(layers, packed):
            save_packed(folder, self.loaded, packed)
            return
        weights = {name: outcome.dequantized for name, outcome in outcomes.items() if outcome.dequantized is not None}
        replace_for_good(layers, weights, self.run.checkpoint.folder_for("base"))
        save_model(folder, self.loaded)

    def _origin(self, base: Mapping[str, BaseIdentity]) -> Origin:
        """Return what the adapter is made from; the hash of its factors is still missing."""
        initializer, needs = self.method.initializer, "model"
        if self.base is not None or initializer.schedule.changes_base:
            needs = "base"
        elif initializer.quantizer.needs_calibration:
            needs = "calibration" if self.run.walk.inputs == "full" else "base"
        return Origin(
            version=version("quailora"),
            model=self.loaded.name,
            quantizer=describe(initializer.quantizer),
            checkpoint=self.base,
            needs=needs,
            layers=len(base),
            base=BaseIdentity.together(base),
            initial="",
        )

    def _write_provenance(self, folder: Path, report: Mapping[str, Any], base: Mapping[str, BaseIdentity]) -> None:
        config = {key: value for key, value in self.settings.items() if key not in _OF_ONE_RUN}
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        write_json(folder / "report.json", report)
        origin = read_provenance(folder).origin  # with the hash of the factors
        sidecar = {
            "base_model": self.loaded.name,
            "quantizer": describe(self.method.initializer.quantizer),
            "solver": describe(self.method.initializer.solver),
            "metric": self.method.initializer.metric,
            "schedule": describe(self.method.initializer.schedule),
            "inputs": self.run.walk.inputs,
            "recipe": self.settings["recipe"],
            "trust": self.method.trust if self.run.walk.inputs == "asymmetric" else None,
            "training": describe(self.method.polish),  # the errors of layers are those before it
            "calibration": asdict(self.source),
            "calibration_tokens": report["calibration_tokens"],
            "mean_error_share": report["mean_error_share"],
            "versions": versions(),
            "origin": asdict(origin) if origin else None,
            "base": {name: asdict(one) for name, one in base.items()},
        }
        write_json(folder / "quailora.json", sidecar)
