"""The finished rows of a comparison on disk, and the files that it ends with."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from .errors import ResumeError
from .outputs import complete_file, write_json
from .report.comparison import Comparison, Row
from .report.html import report
from .report.record import versions
from .report.tables import markdown_table


@final
@dataclass(frozen=True)
class Scoreboard:
    """The finished rows of a comparison, one file each, and what they depend on.

    Attributes:
        folder: where they are.
        fingerprint: what they depend on, item by item.
        fresh: whether to forget what is there.
    """

    folder: Path
    fingerprint: Mapping[str, str]
    fresh: bool

    def open(self) -> None:
        """Make the folder, or check that what is in it belongs to this comparison.

        Raises:
            ResumeError: if it does not; the message says what differs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / "manifest.json"
        if self.fresh:
            for file in self.folder.glob("*.json"):
                file.unlink()
        if manifest.is_file():
            before: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))
            changed = [
                name for name in {**before, **self.fingerprint} if before.get(name) != self.fingerprint.get(name)
            ]
            if changed:
                raise ResumeError(
                    f"{self.folder} holds rows of another comparison, which differs in {', '.join(changed)}. Choose "
                    "another folder, or start again with --fresh."
                )
        write_json(manifest, dict(self.fingerprint))

    def rows(self) -> dict[str, Row]:
        """Return the finished rows by name."""
        files = [file for file in self.folder.glob("*.json") if file.name != "manifest.json"]
        found = [Row.from_dict(json.loads(file.read_text(encoding="utf-8"))) for file in files]
        return {row.name: row for row in found}

    def add(self, row: Row) -> None:
        """Keep a finished row."""
        write_json(self.folder / f"{row.name.replace(' ', '-')}.json", row.as_dict())


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write results.csv, results.json, results.md and report.html."""
    records = comparison.as_records()
    with complete_file(folder / "results.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    content = {"title": comparison.title, "reference": comparison.reference, "versions": versions()}
    write_json(folder / "results.json", content | {"rows": [row.as_dict() for row in comparison.rows]})
    tables = [f"On {text}:\n\n{markdown_table(*comparison.table(text))}\n" for text in comparison.texts]
    with complete_file(folder / "results.md") as partial:
        partial.write_text("\n".join(tables), encoding="utf-8")
    with complete_file(folder / "report.html") as partial:
        partial.write_text(report(comparison), encoding="utf-8")
