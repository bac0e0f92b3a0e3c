# SPDX-License-Identifier: Apache-2.0
"""Write files so that a kill at any moment leaves the old file or the new one, never a partial one."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any


_WRITING_SECONDS = 60


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file next to `path`, flush it to the disk and rename it to `path`.

    Two writers of one path don't meet: their temporary files have names of their own. A link at `path` is replaced,
    not followed. A file that was there keeps its permissions; a new one gets the usual ones.

    Args:
        path: Where to write. Its folder is created if missing.
        content: The whole content of the file.

    Raises:
        OSError: If the folder can't be created or written. Nothing is left behind, and the old file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not path.is_symlink():
            with suppress(FileNotFoundError):
                shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writers of `path` that were killed, also those of earlier versions.

    Files younger than a minute stay: their writers may be at work.
    """
    for leftover in path.parent.glob(f".{path.name}.*tmp"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.lstat().st_mtime > _WRITING_SECONDS:
                leftover.unlink()


def read_regular(path: Path) -> bytes | None:
    """Return the content of a file; `None` if there is none, or a link, a folder, a device or a pipe instead."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))  # Windows has no such flag
    except FileNotFoundError:
        return None
    with open(descriptor, "rb") as file:
        return file.read()


def require_writable(folder: Path, argument: str) -> None:
    """Create `folder` and check that a file can be written there, before hours of training rely on it.

    Args:
        folder: The folder to write to later.
        argument: Name of the argument it came from, for the error.

    Raises:
        ValueError: If it can't be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`{argument}` is {str(folder)!r}, but the report can't be written there ({error.strerror}). "
            "Pass a folder that you may write to."
        ) from error


def back_up(path: Path) -> Path | None:
    """Rename a file that is about to be overwritten to a free name, such as `report-1.json`.

    Returns:
        Where it is now; `None` if there was none, or if another process has renamed it meanwhile.

    Raises:
        ValueError: If it can't be renamed, such as that of another user in `/tmp`.
    """
    if not os.path.lexists(path):
        return None
    try:
        target = _reserved(path)
        try:
            return path.rename(target)
        except BaseException:
            target.unlink()
            raise
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} is there already, the report of an earlier run or of another user, and can't be renamed "
            f"({error.strerror}). Remove it, or pass another folder as `report_dir`."
        ) from error


def _reserved(path: Path) -> Path:
    """Return the first free name for a backup, taken by an empty file: no other process gets it."""
    for number in count(1):
        target = path.with_name(f"{path.stem}-{number}{path.suffix}")
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            continue
        return target
    raise AssertionError("count() does not end")


def finite(value: Any) -> Any:
    """Replace numbers that JSON can't hold by `None`, in nested dicts and lists.

    Example:
        >>> finite({"x": (1.0, math.inf)})
        {'x': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
