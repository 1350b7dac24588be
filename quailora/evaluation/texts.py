"""What models are measured on: texts by name, and how they are cut into windows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from jaxtyping import Int
from torch import Tensor

from ..calibration.text import TextSource
from ..calibration.windows import evaluation_source, evaluation_windows
from ..models.limits import check_token_ids, fitting_length
from ..models.load import LoadedModel
from ..support.choices import BosPlacement

logger = logging.getLogger("quailora")

EVALUATION_LENGTH = 2048
"""Tokens in an evaluation window, where the model has as many positions."""


@final
@dataclass(frozen=True)
class EvaluationTexts:
    """Texts to measure on, and how they are cut into windows that do not overlap.

    Attributes:
        sources: files, folders or data sets; the shipped text if there are none. Do not use the calibration text.
        fields: fields of a record that are the text, see `TextSource`.
        windows: windows of each text at most.
        window_length: tokens in a window. If None, 2048, or as many as the model has positions where these are fewer.
        bos: see `Calibration`.
    """

    sources: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    windows: int = 10
    window_length: int | None = None
    bos: BosPlacement = "every-window"

    @property
    def named(self) -> Mapping[str, TextSource]:
        """The texts by short names."""
        if not self.sources:
            return {"shipped text": evaluation_source(None, self.fields)}
        return {name: evaluation_source(path, self.fields) for name, path in distinct_names(self.sources).items()}

    def check(self) -> None:
        """Raise a `CalibrationError` if a text cannot be read."""
        for source in self.named.values():
            source.check()

    def cut(self, loaded: LoadedModel) -> Iterator[tuple[str, Int[Tensor, "windows length"]]]:
        """Yield the name and the windows of each text: `windows` of them, or fewer if the text is too short.

        Args:
            loaded: the model, and its tokenizer.

        Raises:
            ModelError: if the model has no positions for windows of this length.
            CalibrationError: if a text does not fill one window, or cannot be read.
        """
        length = fitting_length(loaded.model, self.window_length, EVALUATION_LENGTH)
        for name, source in self.named.items():
            documents = source.documents(loaded.tokenizer)
            windows = evaluation_windows(loaded.tokenizer, documents, self.windows, length, self.bos)
            ids = check_token_ids(loaded.model, windows)
            if len(ids) < self.windows:
                logger.warning("%s fills %d windows, not %d.", name, len(ids), self.windows)
            yield name, ids


def distinct_names(paths: Sequence[str]) -> dict[str, str]:
    """Return paths by short names: those of the files, with as many folders as tell all of them apart.

    A path that is there twice gets one name.
    """
    # Candidates from short to long: file names without their endings, then the last part of each path, the last two
    # parts, and so on. The first kind of name that differs for all paths is taken.
    parts = {path: Path(path).parts for path in paths}
    longest = max(map(len, parts.values()), default=0)
    choices = [[Path(path).stem for path in parts]]
    choices += [["/".join(folders[-count:]) for folders in parts.values()] for count in range(1, longest + 1)]
    names = next((choice for choice in choices if len(set(choice)) == len(parts)), list(parts))
    return dict(zip(names, parts, strict=True))
