"""The table that a comparison gives: rows, differences, CSV and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, final

from ..evaluation.scores import Difference, Scores
from ..layer.record import LayerRecord, mean_bits
from ..support.tables import print_note, print_table

_ADAPTER_BYTES = 2  # a number of an adapter in 16 bits
_FAR = 1.5  # times the least KL: so much further from full precision, a lower perplexity misleads

MARKS = (
    "* The base is not what the quantizer alone gives, and has to be saved. † The perplexity is lower than that "
    "of the recipe with the least KL, but the model is further from full precision: it has learned the text."
)
"""What the marks behind the names of rows mean."""


@final
@dataclass(frozen=True)
class Row:
    """One row of the table: a variant of the model with its scores.

    Attributes:
        name: name of the row, such as "quailora r16".
        scores: scores of the variant by name of the text.
        recipe: name of the recipe; empty for full precision and for bases alone.
        rank: rank of the adapter, or that of LoRA in a row whose family is as large; 0 for a base alone.
        changes_base: whether the base is not what the quantizer alone gives.
        seconds: seconds of calibration and initialization. Calibration counts for every row, and what else several rows
            share, such as the quantized weights, for the first of them.
        layers: errors of each layer; empty for full precision.
        spectrum: mean over layers of the share of the output error that the first 1, 2, ... directions remove; empty
            for methods that minimise something else.
        method: full description of the method.
        tasks: accuracy by name of the task.
        family: description of the family of adapters, see `describe`; None for LoRA and bases alone.
        size: rank of the adapter itself, or what its family has in place of one.
        shared: numbers of the adapter that all layers share.
    """

    name: str
    scores: Mapping[str, Scores]
    recipe: str = ""
    rank: int = 0
    changes_base: bool = False
    seconds: float = 0.0
    layers: Sequence[LayerRecord] = field(default=(), repr=False)
    spectrum: Sequence[float] = field(default=(), repr=False)
    method: str = ""
    tasks: Mapping[str, float] = field(default_factory=dict)
    family: Mapping[str, Any] | None = None
    size: int = 0
    shared: int = 0

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Row:
        """Build what `as_dict` wrote down."""
        scores = {
            text: Scores(tuple(each["losses"]), tuple(each["divergences"])) for text, each in content["scores"].items()
        }
        layers = tuple(LayerRecord.read(layer) for layer in content["layers"])
        return cls(**{**content, "scores": scores, "layers": layers, "spectrum": tuple(content["spectrum"])})

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON can hold it."""
        return asdict(self)

    @property
    def base_bytes(self) -> int:
        """Stored bytes of all quantized layers, everything counted; 0 for full precision."""
        sizes = [layer.shape[0] * layer.shape[1] * layer.bits_per_weight / 8 for layer in self.layers]
        return round(sum(sizes))

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter with numbers of 16 bits, but for those that training leaves as they are: 32 bits."""
        untrained = sum(layer.untrained for layer in self.layers)
        return _ADAPTER_BYTES * (self.adapter_numbers - untrained) + 4 * untrained

    @property
    def adapter_numbers(self) -> int:
        """Numbers in the file of the adapter; 0 without an adapter."""
        return sum(layer.numbers for layer in self.layers) + self.shared if self.recipe else 0

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the base for each weight; 0 for full precision."""
        return mean_bits(self.layers) if self.layers else 0.0

    @property
    def mean_relative_error(self) -> float:
        """Mean over layers of the output error as a share of the output's energy."""
        return sum(layer.relative_error for layer in self.layers) / max(1, len(self.layers))


@final
@dataclass(frozen=True)
class Comparison:
    """All rows of one comparison.

    Attributes:
        title: model and quantizer that were compared.
        reference: the recipe that differences are taken from, at the same rank.
        texts: names of the texts; plots are about the first one.
        rows: full precision first, then bases alone, then recipes.
        tasks: names of the tasks.
        origin: what the comparison was made by and with, line by line: command, date, versions.
    """

    title: str
    reference: str
    texts: tuple[str, ...]
    rows: tuple[Row, ...]
    tasks: tuple[str, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)

    def closest(self, text: str) -> Row | None:
        """Return the recipe with the least KL, whose model is closest to full precision; None without recipes."""
        recipes = [row for row in self.rows if row.recipe]
        return min(recipes, key=lambda row: row.scores[text].divergence, default=None)

    def misleads(self, row: Row, text: str) -> bool:
        """Return whether the perplexity of a row makes the model look closer to full precision than its KL does.

        Training on text like that of the evaluation lowers the perplexity below what full precision has, or below that
        of the closest recipe, while the model moves away from full precision.
        """
        # Perplexity alone cannot tell a better base from a model that has learned the text. KL can: it is zero for the
        # full-precision model only, and grows with every step away from it, to whichever side.
        closest = self.closest(text)
        if closest is None or not row.recipe or row is closest:
            return False
        scores, best = row.scores[text], closest.scores[text]
        return scores.perplexity < best.perplexity and scores.divergence > _FAR * best.divergence

    def gap_closed(self, row: Row, text: str) -> float | None:
        """Return the share of the gap in perplexity from the base alone to int8 that a row closes.

        None for rows without an adapter, and where int8 was not measured or there is no finite gap.
        """
        # 0 is the base alone and 1 is int8, which is close to full precision. A row can be below 0,
        # or above 1 where it has learned the text.
        of = {each.name: each.scores[text].perplexity for each in self.rows}
        gap = of["base alone"] - of.get("int8", of["base alone"])
        if not row.recipe or not 0 < gap < math.inf:
            return None
        return (of["base alone"] - row.scores[text].perplexity) / gap

    def difference(self, row: Row, text: str) -> Difference | None:
        """Return the loss of a recipe less that of the reference at its rank, by LoRA, in nats a token."""
        wanted = self.reference, row.rank, None
        other = next((each for each in self.rows if (each.recipe, each.rank, each.family) == wanted), None)
        if other is None or not row.recipe or row is other or len(row.scores[text].losses) < 2:
            return None
        return Difference.between(row.scores[text], other.scores[text])

    def as_records(self) -> list[dict[str, Any]]:
        """Return one flat record for each row and text."""
        records = []
        for row in self.rows:
            for text in self.texts:
                difference = self.difference(row, text)
                records.append({
                    "row": row.name,
                    "recipe": row.recipe,
                    "rank": row.rank,
                    "family": "lora" if row.family is None else row.family["class_path"],
                    "size": row.size,
                    "adapter_numbers": row.adapter_numbers,
                    "changes_base": row.changes_base,
                    "text": text,
                    "perplexity": row.scores[text].perplexity,
                    "divergence": row.scores[text].divergence,
                    "gap_closed": self.gap_closed(row, text),
                    "difference": difference.mean if difference else None,
                    "difference_low": difference.low if difference else None,
                    "difference_high": difference.high if difference else None,
                    "bits_per_weight": row.bits_per_weight,
                    "base_bytes": row.base_bytes,
                    "adapter_bytes": row.adapter_bytes,
                    "mean_relative_error": row.mean_relative_error,
                    "seconds": row.seconds,
                    **{task: row.tasks.get(task) for task in self.tasks},
                })
        return records

    def table(self, text: str) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of the table for one text."""
        header = ["row", "perplexity", "KL", "gap closed", f"loss - {self.reference} (95 %)", "MB", "seconds"]
        header += self.tasks
        rows = []
        for row in self.rows:
            gap, difference, scores = self.gap_closed(row, text), self.difference(row, text), row.scores[text]
            size = (row.base_bytes + row.adapter_bytes) / 1e6
            rows.append([
                row.name + " *" * bool(row.recipe and row.changes_base) + " †" * self.misleads(row, text),
                f"{scores.perplexity:.3f}",
                f"{scores.divergence:.4f}",
                "" if gap is None else f"{gap:.1%}",
                "" if difference is None else f"{difference.mean:+.4f} ({difference.low:+.4f} {difference.high:+.4f})",
                f"{size:.1f}" if size else "",
                f"{row.seconds:.0f}" if row.recipe else "",
                *(f"{row.tasks[task]:.1%}" if task in row.tasks else "" for task in self.tasks),
            ])
        return header, rows

    def show(self) -> None:
        """Print one table for each text."""
        for text in self.texts:
            print_table(f"{self.title}, on {text}", *self.table(text))
        print_note(MARKS)
