"""Text of a file: decompressed and decoded, or refused with the file, the line and the byte that are at fault."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, Literal

from ...errors import CalibrationError
from .records import one_line

_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is the start of this one
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_START = 16  # bytes that tell a compression or an encoding


ShippedText = Literal["calibrate", "evaluate"]
"""Names of the texts that ship with quailora."""


def shipped_text(name: ShippedText) -> str:
    """Return a shipped text."""
    return files("quailora").joinpath(f"data/{name}.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    r"""Return the text of a file, with every line break as `\n`.

    Raises:
        CalibrationError: if the file cannot be read, or is no text in UTF-8, or in UTF-16 or UTF-32 with a byte order
            mark.
    """
    with reading(path), decompressed(path) as content:
        data = content.read()
    return decoded(data, path).replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yield the lines of a file with their numbers from 1 on, one in memory at a time; only `\n` ends a line.

    Raises:
        CalibrationError: see `read_text`.
    """
    with reading(path), decompressed(path) as content:
        start = content.read(_START)
        content.seek(0)
        if encoding_of(start) in {"utf-16", "utf-32"}:  # a line break is several bytes: decode the file as a whole
            yield from enumerate(decoded(content.read(), path).split("\n"), 1)
            return
        for number, line in enumerate(content, 1):
            yield number, decoded(line, path, number)


def decoded(data: bytes, path: Path, line: int = 1) -> str:
    """Return the text of bytes.

    Args:
        data: the content of a file, or one line of it.
        path: the file.
        line: number of the first line in `data`.

    Raises:
        CalibrationError: if the bytes are no text in the encoding that their byte order mark names, or in UTF-8.
    """
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start]
        number, column = line + before.count(b"\n"), error.start - before.rfind(b"\n")
        raise CalibrationError(
            f"Expected text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, but {path}:{number} has the byte "
            f"0x{data[error.start]:02x} at position {column} of the line, which is not {encoding.upper()}. Save the "
            "file as UTF-8; if it is no text, unpack it or name its format by its ending."
        ) from error
    if "\0" in text:
        number = line + text[: text.index("\0")].count("\n")
        raise CalibrationError(
            f"Expected text, but {path}:{number} holds a NUL character, as binary files and UTF-16 without a byte "
            "order mark do. Save the file as text in UTF-8."
        )
    return text


def encoding_of(start: bytes) -> str:
    """Return the encoding that a file starts in: by its byte order mark, else UTF-8."""
    return next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file inside a `with` statement into a `CalibrationError` that names it."""
    try:
        yield
    except CalibrationError:
        raise
    except Exception as error:  # every compression and every format has errors of its own
        why = getattr(error, "strerror", None) or one_line(error)
        raise CalibrationError(
            f"Cannot read {path}: {why}. Expected a readable and complete file. Check its permissions, or copy or "
            "download it again."
        ) from error


@contextmanager
def decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, through the decompressor that its first bytes ask for, whatever its name is."""
    with path.open("rb") as raw:
        start = raw.read(_START)
    with _opener(start, path)(path, "rb") as content:
        yield content


def _opener(start: bytes, path: Path) -> Callable[..., Any]:
    if start.startswith(b"\x1f\x8b"):
        return gzip.open
    if start.startswith(b"\xfd7zXZ\x00"):
        return lzma.open
    if start.startswith(b"BZh") and start[4:10] == b"1AY&SY":
        return bz2.open
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            from zstandard import open as open_zstandard
        except ImportError as error:
            raise CalibrationError(
                f"{path} is compressed by Zstandard, which needs a package: pip install zstandard. Or unpack the file."
            ) from error
        return open_zstandard  # type: ignore[no-any-return]
    if start.startswith(b"PK\x03\x04"):
        raise CalibrationError(f"Expected a file of text or records, but {path} is a zip archive. Unpack it.")
    return open
