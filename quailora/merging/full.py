"""The full-precision model with what trainings have changed, as a checkpoint of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from ..adapters.change import TrainedChange
from ..adapters.combine import check_alone, factors_of
from ..adapters.given import AdapterGiven
from ..errors import ConfigurationError
from ..models.load import empty_model, load_model, save_model
from ..pipeline.checks import output_folder
from ..pipeline.fine_tuned import FineTuned
from ..pipeline.options import Resources
from ..quantizers import Quantizer
from ..support.choices import DtypeName
from ..support.files import MODEL_MARK, StrPath, new_folder, write_json
from ..support.machine import within_memory
from ..support.tables import print_table
from .trained_on import base_trained_on, check_base, check_model, model_of


@final
@dataclass(frozen=True)
class FullModel:
    """What `merge_full` returns.

    Attributes:
        folder: folder of the model.
        layers: number of layers that were changed.
        dtype: dtype of its weights.
    """

    folder: Path
    layers: int
    dtype: str

    def show(self) -> None:
        """Print a line."""
        rows = [["changed layers", str(self.layers)], ["dtype", self.dtype]]
        print_table(f"{self.folder}: the full-precision model with what was trained", ("what", "value"), rows)


@within_memory("`device='cpu'`")
def merge_full(
    adapters: Sequence[AdapterGiven],
    *,
    out: StrPath,
    factors: Sequence[float] = (),
    initial: StrPath | None = None,
    model: StrPath | None = None,
    trained_on: Quantizer | StrPath | None = None,
    overwrite: bool = False,
    resources: Resources = Resources(),  # noqa: B008 # frozen
) -> FullModel:
    """Write the full-precision model with `W + sum_i c_i s (B_i A_i - B0 A0)` in place of its weights.

    The correction for the quantized base is subtracted, once from each adapter, so that it is not added to weights that
    have no error. The weights stay on disk, and one shard is in memory at a time.

    Args:
        adapters: hub names or folders of the trained adapters, or the `PeftModel` that was trained.
        out: folder for the model.
        factors: the factor `c_i` of each adapter; 1 for each if empty.
        initial: the adapter that the trainings started from, "zero" if it added nothing; looked for if None.
        model: the full-precision model; by default what the first adapter notes.
        trained_on: the base that the adapters were trained on, for families whose change depends on it, such as DoRA;
            by default what the first adapter notes.
        overwrite: replace a merged model that is in the folder.
        resources: dtype of the model that is written; the dtype of the checkpoint by default.

    Raises:
        QuailoraError: for everything that is wrong with the input; the message says what to do.
    """
    changes = tuple(TrainedChange.read(adapter, initial) for adapter in adapters)
    weights = factors_of(changes, factors)
    check_factors(changes, weights)
    read = [folder for change in changes for folder in FineTuned((change,)).folders]
    folder = output_folder(out, overwrite=overwrite, model=True, inputs=[*read, initial, model, trained_on])
    name = model_of(changes[0], model)
    needs_base = any(change.needs_base for change in changes)
    base = base_trained_on(changes[0], name, trained_on) if needs_base else None
    check_model(changes[0], model, base)
    for change in changes[1:] if base is not None else ():
        check_base(change, name, base)  # type: ignore[arg-type] # there is one
    fine_tuned = FineTuned(changes, weights, base)
    # The weights stay on disk while the model is changed and written, whatever its size: each changed layer is a file
    # that takes the place of the layer in the map of the loaded checkpoint.
    offload = folder.with_name(f".{folder.name}.offload")
    shutil.rmtree(offload, ignore_errors=True)  # of a process that was killed
    try:
        loaded = load_model(
            name,
            dtype_in_file(name, resources),
            "cpu",
            offload=offload,
            allow_pickle=resources.allow_pickle,
            trust_remote_code=resources.trust_remote_code,
        )
        layers = fine_tuned.check(loaded.model)
        with (
            fine_tuned.within(loaded, offload / "changed", for_good=True),
            new_folder(folder, overwrite, model=True) as partial,
        ):
            save_model(partial, loaded)
            content = {
                "model": loaded.name,
                "adapters": [str(change.trained.folder) for change in changes],
                "factors": list(weights),
                "change": fine_tuned.digest,
            }
            write_json(partial / MODEL_MARK, content)
        return FullModel(folder, len(layers), str(loaded.model.dtype).removeprefix("torch."))
    finally:
        shutil.rmtree(offload, ignore_errors=True)


def dtype_in_file(model: str, resources: Resources) -> DtypeName:
    """Return the dtype to write a model in: that of its checkpoint where none is named, also float16 on a CPU."""
    # Nothing is computed in it but sums of weights.
    stored = empty_model(model, trust_remote_code=resources.trust_remote_code).dtype
    return "float16" if resources.dtype == "auto" and stored == torch.float16 else resources.dtype


def check_factors(changes: Sequence[TrainedChange], factors: Sequence[float]) -> None:
    """Raise a `ConfigurationError` if changes that have no start of their own to subtract are to be weighed or added.

    Args:
        changes: what trainings have changed.
        factors: how much each of them counts.
    """
    for change in changes if len(changes) > 1 or factors[0] != 1 else ():
        check_alone(change)
    whole = [change for change in changes if change.modules]
    if whole and (len(changes) > 1 or factors[0] != 1):
        raise ConfigurationError(
            f"{whole[0].trained.folder} has trained {next(iter(whole[0].modules))} as a whole, which has no start to "
            "subtract, so that it cannot be weighed or added to others. Merge this adapter alone."
        )
