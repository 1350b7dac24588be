"""What can be said about a request before any model is read."""

from __future__ import annotations

from pathlib import Path

from ..calibration.walk import InputsOf
from ..errors import ConfigurationError
from ..methods.method import Method
from ..models.load import DeviceName, resolve_device
from ..support.files import StrPath, check_output, check_writable, folder_of

_SEEDS = 2**63


def check_seed(seed: int) -> None:
    """Raise a `ConfigurationError` unless PyTorch's generators take a seed and the one after it."""
    if not 0 <= seed < _SEEDS:
        raise ConfigurationError(f"Expected a seed from 0 to {_SEEDS - 1}, got {seed}. Try --seed 0.")


def check_place(out: StrPath, *, overwrite: bool) -> Path:
    """Return the folder that results go to.

    Raises:
        ConfigurationError, StorageError, OutputExistsError: if it cannot be made or must stay as it is.
    """
    folder = folder_of(out)
    check_writable(folder)
    check_output(folder, overwrite)
    return folder


def check_method(method: Method, inputs: InputsOf) -> None:
    """Raise a `ConfigurationError` if the parts of a method do not go together."""
    method.initializer.schedule.check(method.initializer.quantizer)
    if method.initializer.metric == "fisher" and inputs == "asymmetric":
        raise ConfigurationError(
            'The metric "fisher" weighs the outputs of the full-precision model, and asymmetric inputs have others. '
            "Take --inputs full, or the metric gram."
        )
    if method.initializer.schedule.needs_validation and inputs != "asymmetric":
        raise ConfigurationError("This schedule needs held-out tokens, which only asymmetric inputs have.")


def check_request(seed: int, device: DeviceName, method: Method, inputs: InputsOf) -> None:
    """Raise a `ConfigurationError` if seed, device or method cannot be had."""
    check_seed(seed)
    resolve_device(device)
    check_method(method, inputs)
