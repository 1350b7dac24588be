"""What is read is not removed by what is written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import OutputExistsError
from .files import RESULTS


def check_inputs(out: Path, inputs: Iterable[object], *, model: bool = False) -> None:
    """Raise an `OutputExistsError` if what is read would be removed when a result takes the place of an older one.

    Args:
        out: the folder of the result.
        inputs: what is read: folders and files, among hub names and other things, which are ignored.
        model: whether a model is written, see `check_output`.
    """
    if not out.is_dir():
        return
    for given in inputs:
        path = Path(given).expanduser().resolve() if isinstance(given, (str, Path)) and str(given) else None
        if path is None or not path.exists() or not path.is_relative_to(out):
            continue
        inside = path.relative_to(out).parts
        if not inside or model or inside[0] in RESULTS:
            raise OutputExistsError(
                f"Expected another folder for the result than {out}, since {given} in it is read and would be replaced "
                "by it. Choose another folder."
            )
