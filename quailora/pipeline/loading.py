"""The model of a run, and the folder for its state."""

from __future__ import annotations

from pathlib import Path

from ..models.load import LoadedModel, load_model, model_in_memory
from ..support import distributed
from .plan import RunPlan


def work_folder(plan: RunPlan) -> Path | None:
    """Return the folder for the state of a run, beside its output; None where a run cannot be resumed."""
    if plan.output is None or not isinstance(plan.model, str):
        return None
    folder = Path(plan.output.folder)
    return folder.with_name(f"{folder.name}.partial")


def loaded_model(plan: RunPlan, offload: Path | None) -> LoadedModel:
    """Return the model, loaded; with a folder `offload`, weights stay on disk, and converted ones are written there."""
    if not isinstance(plan.model, str):
        return model_in_memory(plan.model)
    resources = plan.resources
    return load_model(
        plan.model,
        resources.dtype,
        resources.device,
        offload=offload / f"offload-{distributed.rank()}" if offload is not None else None,
        allow_pickle=resources.allow_pickle,
        trust_remote_code=resources.trust_remote_code,
    )
