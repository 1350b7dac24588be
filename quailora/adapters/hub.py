"""Adapters on the hub: fetched by their names, and uploaded."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from ..errors import ModelError, StorageError, first_line
from ..support.files import RESULTS, StrPath

logger = logging.getLogger("quailora")

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_NOT_NEEDED = ("*.bin", "*.pt", "*.pth", "*.pkl", "checkpoint-*/*", "runs/*")


def adapter_folder(adapter: StrPath) -> Path:
    """Return the folder of an adapter. A name `owner/adapter` that is no folder here is fetched from the hub.

    Raises:
        ModelError: if the hub does not give it.
    """
    folder = Path(adapter).expanduser()
    if folder.exists() or not _HUB_NAME.fullmatch(str(adapter)):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(adapter), ignore_patterns=list(_NOT_NEEDED)))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"Expected an adapter's folder or its name on the hub, got {str(adapter)!r}: there is no such folder, and "
            f"the hub gives none ({first_line(error)})."
        ) from error


def check_upload(name: str | None) -> None:
    """Raise an error if an upload was asked for and the hub does not know the user; called before anything is computed.

    Raises:
        StorageError: if the name is no hub name, there is no login, or the hub cannot be reached.
    """
    if name is None:
        return
    from huggingface_hub import HfApi

    if not _HUB_NAME.fullmatch(name):
        raise StorageError(f"Expected a hub name such as owner/adapter to upload to, got {name!r}.")
    try:
        HfApi().whoami()
    except (OSError, ValueError) as error:
        raise StorageError(
            f"Cannot upload to {name!r}: {first_line(error)} Log in with `hf auth login`, or leave out `push_to_hub`."
        ) from error


def upload(folder: Path, name: str | None) -> None:
    """Upload the folder that `init` has written, if a name was given.

    A repository that is not there is created, and is private.

    Raises:
        StorageError: if the hub does not take it; the folder stays as it is.
    """
    if name is None:
        return
    from huggingface_hub import HfApi

    try:
        # Private, because publishing is for the user to decide. An existing repository keeps its visibility.
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[*RESULTS, "base/*", "change/*"],
            commit_message="Upload an adapter made by quailora",
        )
    except (OSError, ValueError) as error:
        raise StorageError(
            f"The adapter is complete in {folder}, but uploading it to {name!r} failed: {first_line(error)} "
            f"Try again with: hf upload {name} {folder}"
        ) from error
    logger.info("Uploaded to %s.", name)
