"""From files, folders and data sets to documents, which are strings."""

from .files import shipped_text
from .source import TextSource

__all__ = ["TextSource", "shipped_text"]
