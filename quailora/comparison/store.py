"""The finished rows of a comparison on disk, and the files of its results."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from ..errors import ResumeError
from ..pipeline.fingerprint import digest
from ..pipeline.report import versions
from ..support.files import complete_file, write_json
from ..support.tables import markdown_table
from .html import report
from .table import MARKS, Comparison, Row

logger = logging.getLogger("quailora")


@final
@dataclass(frozen=True)
class RowStore:
    """A folder of finished rows, one file for each, with a manifest of what they depend on.

    Attributes:
        folder: the folder.
        fingerprint: everything that the rows depend on, item by item.
        fresh: whether to delete earlier rows in the folder.
    """

    folder: Path
    fingerprint: Mapping[str, str]
    fresh: bool

    def open(self) -> None:
        """Make the folder, or check that the rows in it belong to this comparison.

        Raises:
            ResumeError: if they do not; the message says what differs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / "manifest.json"
        if self.fresh:
            for file in self.folder.glob("*.json"):
                file.unlink()
        before = self._manifest()
        changed = [name for name in {**before, **self.fingerprint} if before.get(name) != self.fingerprint.get(name)]
        if before and changed:
            raise ResumeError(
                f"{self.folder} holds rows of another comparison, which differs in {', '.join(changed)}. Choose "
                "another folder, or start again with `fresh=True`."
            )
        for file in self._files():
            if self._read(file) is None:
                logger.warning("The row in %s is damaged. It is kept as .damaged, and measured again.", file.name)
                file.replace(file.with_suffix(".damaged"))
        write_json(manifest, dict(self.fingerprint))

    def rows(self) -> dict[str, Row]:
        """Return the finished rows by name."""
        rows = [self._read(file) for file in self._files()]
        return {row.name: row for row in rows if row is not None}

    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.glob("*.json") if file.name != "manifest.json")

    def _manifest(self) -> dict[str, str]:
        """Return what the rows in the folder depend on; nothing where there are no rows.

        Raises:
            ResumeError: if there are rows, but their manifest is missing or damaged.
        """
        file = self.folder / "manifest.json"
        try:
            content: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            known = isinstance(content, dict) and bool(content)
        except (OSError, ValueError):
            content, known = {}, False
        if not known and self._files():
            raise ResumeError(
                f"Expected {file} to say what the rows in its folder depend on, but it is missing or damaged. Choose "
                "another folder, or start again with `fresh=True`."
            )
        return content if known else {}

    @staticmethod
    def _read(file: Path) -> Row | None:
        """Return the row in a file, or None if the file is damaged."""
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            kept = content.pop("digest", None)  # earlier versions kept none
            row = Row.from_dict(content)
            return row if kept in {None, digest([json.dumps(row.as_dict())])} else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def add(self, row: Row) -> None:
        """Keep a finished row."""
        # The digest finds a file that is valid JSON but not what was written, as after a full disk or an edit by hand.
        content = row.as_dict()
        content["digest"] = digest([json.dumps(content)])
        write_json(self.folder / f"{re.sub(r'[ :]', '-', row.name)}.json", content)


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write results.csv, results.json, results.md and report.html."""
    records = comparison.as_records()
    with complete_file(folder / "results.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    content = {"title": comparison.title, "reference": comparison.reference, "versions": versions()}
    content |= {"origin": dict(comparison.origin)}
    write_json(folder / "results.json", content | {"rows": [row.as_dict() for row in comparison.rows]})
    tables = [f"On {text}:\n\n{markdown_table(*comparison.table(text))}\n" for text in comparison.texts]
    with complete_file(folder / "results.md") as partial:
        partial.write_text("\n".join([*tables, MARKS, ""]), encoding="utf-8")
    with complete_file(folder / "report.html") as partial:
        partial.write_text(report(comparison), encoding="utf-8")
