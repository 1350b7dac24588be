"""Write what a finished run leaves: adapter, base, report, provenance, model card."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import torch
import yaml

from ..adapters.change import EARLIER
from ..adapters.files import write_adapter
from ..adapters.frozen import with_fresh
from ..adapters.lora import expert_stacks
from ..adapters.modules import find_modules, tensors_to_save
from ..adapters.provenance import Origin, read_provenance
from ..adapters.stacked import adapter_of_change
from ..adapters.written import check_files
from ..bases.packed import unpacked
from ..bases.writer import savable, save_packed
from ..errors import ConfigurationError, named
from ..families import Correction
from ..layer.record import LayerRecord
from ..methods.method import Method
from ..models.layers import Layer, explicit_targets
from ..models.load import LoadedModel, save_model
from ..models.weights import replace_for_good, resident
from ..quantizers.identity import BaseIdentity
from ..support.choices import BaseFormat
from ..support.files import write_json, write_tensors
from ..support.phases import Phases
from ..support.settings import describe
from .card import BESIDE, model_card
from .described import described_method, described_plan, options_of
from .formats import bits_of_layers
from .options import Output
from .plan import RunPlan, title_of
from .report import build_report, versions
from .run import ModelRun
from .store import StoredLayer, corrections_of, weights_of
from .targets import with_kept

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True, eq=False)
class AdapterOutput:
    """Everything that goes into an output folder.

    Attributes:
        plan: what was asked for.
        phases: time and memory of each phase of the run.
        loaded: the model.
        layers: the layers with a correction.
        tokens: number of calibration tokens.
        run: the finished run.
    """

    plan: RunPlan
    phases: Phases
    loaded: LoadedModel
    layers: Mapping[str, Layer]
    tokens: int
    run: ModelRun

    @cached_property
    def finished(self) -> dict[str, StoredLayer]:
        """The result for each layer, by name; tensors may be memory-mapped."""
        return self.run.finished("", self.plan.method.distillation)

    @property
    def records(self) -> list[LayerRecord]:
        """Errors of each layer with a correction."""
        return [stored.record for stored in self.finished.values() if stored.record is not None]

    @property
    def corrections(self) -> dict[str, Correction]:
        """The correction of each layer, by name, before PEFT's scaling is divided out."""
        found = corrections_of(self.finished)
        method, seed = self.plan.method, self.plan.source.seed
        if method.frozen_rank is None:
            return found
        return {name: with_fresh(name, correction, method.scaling, seed) for name, correction in found.items()}

    def report(self) -> dict[str, Any]:
        """Return the content of `report.json`."""
        method, known = self.plan.method, {record.name: record.bits_per_weight for record in self.records}
        content = build_report(
            described_plan(self.plan),
            self.phases.entries,
            self.records,
            bits_of_layers(with_kept(self.loaded.model, self.finished, method.kept), method, known),
            self.tokens,
            self.run.seconds,
        )
        return content | {"blocks": describe(method.blocks), "training": describe(method.distillation)}

    def write(self, folder: Path, base_format: BaseFormat | None) -> dict[str, Any]:
        """Write all files; return the report.

        Tensors of finished layers that are in files are memory-mapped, so that they are not all in memory at once.

        Args:
            folder: the folder to write to.
            base_format: format of the base; None writes no base.
        """
        method = self.plan.method
        with self.phases.measure("write"):
            base = {record.name: record.base for record in self.records if record.base is not None}
            self._write_adapter(folder, self._origin(base))
            if base_format is not None:
                self.write_base(folder / "base", base_format)
            self._write_change(folder / EARLIER)
        report = self.report()
        self._write_provenance(folder, report, base)
        card = model_card(
            method,
            self.records,
            model=title_of(self.plan.model),
            base_model=self._checkpoint or self.loaded.name,
            calibration_tokens=self.tokens,
            quantized_base=f"{BESIDE}/base" if base_format else self._checkpoint,
            dtype=self._dtype,
            moved=self.plan.fine_tuned is not None,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        return report

    @property
    def _dtype(self) -> str:
        """The dtype that the base has to be loaded in, as transformers takes it."""
        asked = self.plan.resources.dtype
        return asked if isinstance(self.plan.model, str) else str(self.loaded.model.dtype).removeprefix("torch.")

    @property
    def _checkpoint(self) -> str | None:
        """Hub name or folder of the quantized checkpoint that is the base, if the run did not make the base."""
        base = self.plan.method.base
        return None if base is None else base.checkpoint

    def _write_adapter(self, folder: Path, origin: Origin) -> None:
        """Write the two files that PEFT reads, and read them as PEFT does."""
        scaling, corrections = self.plan.method.scaling, self.corrections
        output = self.plan.output or Output(folder)
        names, dtype = output.modules_to_save, getattr(torch, output.factors_dtype)
        modules = tensors_to_save(find_modules(self.loaded.model, names, self.layers))
        write_adapter(
            folder,
            corrections,
            self.plan.method.family,
            scaling,
            target_modules=explicit_targets(self.loaded.model, self.layers),
            base_model=self._checkpoint or self.loaded.name,
            experts=expert_stacks(self.layers),
            shapes={name: layer.shape for name, layer in self.layers.items()},
            origin=origin,
            modules=modules,
            modules_to_save=names,
            dtype=dtype,
        )
        check_files(folder, self.plan.empty, self.layers, corrections, self.plan.method.family, scaling, modules, dtype)

    def _write_change(self, folder: Path) -> None:
        """Write what the factors hold besides the correction as an adapter of its own, which later steps need."""
        fine_tuned = self.plan.fine_tuned
        if fine_tuned is None:
            return
        (change,) = fine_tuned.changes
        adapter = adapter_of_change(change)
        if adapter is None:
            return
        tensors, config = adapter
        folder.mkdir()
        write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": self.loaded.name})
        write_tensors(folder / "adapter_model.safetensors", tensors)

    def write_base(
        self, folder: Path, base_format: BaseFormat, finished: Mapping[str, StoredLayer] | None = None
    ) -> None:
        """Write the quantized model: packed, where transformers reads its format, else dequantized.

        Args:
            folder: the folder to write to.
            base_format: its format.
            finished: the layers; those of the run if None.
        """
        layers, finished = self.run.layers, self.finished if finished is None else finished
        packed = {name: stored.packed for name, stored in finished.items()}
        if base_format != "dequantized" and savable(layers, packed):
            save_packed(folder, self.loaded, packed, awq=base_format == "awq")
            return
        if base_format == "awq":
            raise ConfigurationError("Expected layers that AutoAWQ's format can hold. Take another `base_format`.")
        if base_format != "dequantized":
            logger.warning(
                "The base is written in floating point, which takes as much memory as full precision: no checkpoint of "
                "stock packages holds the codes of all of its layers."
            )
        replace_for_good(layers, weights_of(finished), self.run.store.folder_for("base"))
        save_model(folder, self.loaded)

    def _uncorrected(self) -> dict[str, BaseIdentity]:
        """Return the identity of each layer without a correction, if others make up for it and the base is written."""
        found: dict[str, BaseIdentity] = {}
        if self.plan.method.inputs == "full":
            return found
        for name, stored in self.finished.items():
            # Without the packed layer, which is kept for a base that is written, its codes are not known.
            if stored.record is None and stored.dequantized is not None and stored.packed:
                layer, values = self.run.layers[name], stored.dequantized
                with resident(layer.module), named(name):
                    weight = layer.weight.to(values.device)
                    found[name] = BaseIdentity.of(unpacked(stored.packed, values.dtype), weight)
        return found

    def _origin(self, base: Mapping[str, BaseIdentity]) -> Origin:
        """Return what the adapter is made from; the hash of its factors is still missing."""
        holds = "" if self.plan.fine_tuned is None else self.plan.fine_tuned.digest
        return replace(origin_of(self.plan.method, self.loaded.name, base), holds=holds)

    def _write_provenance(self, folder: Path, report: Mapping[str, Any], base: Mapping[str, BaseIdentity]) -> None:
        method, options = self.plan.method, options_of(self.plan)
        if options is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
        write_json(folder / "report.json", report)
        origin = read_provenance(folder).origin  # with the hash of the factors
        sidecar = {
            "base_model": self.loaded.name,
            **described_method(method),
            "recipe": method.recipe,
            "training": describe(method.distillation),  # errors of layers are those before any training
            "calibration": self.plan.source.described(),
            "calibration_tokens": report["calibration_tokens"],
            "mean_error_share": report["mean_error_share"],
            "versions": versions(),
            "origin": asdict(origin) if origin else None,
            "base": {name: asdict(one) for name, one in base.items()},
            "uncorrected": {name: asdict(one) for name, one in self._uncorrected().items()},
        }
        write_json(folder / "quailora.json", sidecar)


def origin_of(method: Method, model: str, base: Mapping[str, BaseIdentity]) -> Origin:
    """Return what an adapter is made from, without the hash of its factors.

    Args:
        method: how its layers were initialized.
        model: hub name or folder of the full-precision model.
        base: identity of each layer of the base.
    """
    quantizer = method.quantizer if method.base is None else method.base.quantizer
    checkpoint = None if method.base is None else method.base.checkpoint
    # `needs` says what the base can be made from again. "model": the full-precision model is enough. "calibration": the
    # quantizer also needs the calibration text, whose inputs in the full-precision model it looks at. "base": it cannot
    # be made again, because it depends on corrections or was not made by quailora, and has to be loaded itself.
    needs = "model"
    chosen = method.initializer.schedule.changes_base or method.trains_base or bool(method.quantizers)
    if quantizer is None or checkpoint is not None or chosen:
        needs = "base"
    elif quantizer.needs_calibration:
        needs = "calibration" if method.inputs == "full" else "base"
    return Origin(
        version=version("quailora"),
        model=model,
        quantizer=describe(quantizer) or {},
        checkpoint=checkpoint,
        needs=needs,
        layers=len(base),
        base=BaseIdentity.together(base),
        initial="",
        frozen_rank=method.frozen_rank,
    )
