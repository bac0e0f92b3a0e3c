# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a kill at any moment leaves the old file or the new one, never a torn one."""

from __future__ import annotations

import math
import os
import tempfile
from itertools import count
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` beside `path`, flushes it to the disk and renames it into place.

    Args:
        path: Where the content shall be. Its folder is made if missing.
        content: The whole content of the file.

    Raises:
        OSError: If the folder can't be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def require_writable(folder: Path, argument: str) -> None:
    """Makes `folder` and checks that a file can be written there, before hours of training rely on it.

    Args:
        folder: The folder to write to later.
        argument: Name of the argument it came from, for the error.

    Raises:
        ValueError: If it can't be made or written.
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
    """Gives a file that is about to be written anew a name of its own, such as `report-1.json`.

    Returns:
        Where it is now; `None` if there was none, or if another process has moved it meanwhile.

    Raises:
        ValueError: If it can't be renamed: in a folder such as `/tmp`, that of another user can't.
    """
    if not path.exists():
        return None
    free = next(place for n in count(1) if not (place := path.with_name(f"{path.stem}-{n}{path.suffix}")).exists())
    try:
        return path.rename(free)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} is there already, the report of an earlier run or of another user, and can't be renamed "
            f"({error.strerror}). Remove it, or pass another folder as `report_dir`."
        ) from error


def finite(value: Any) -> Any:
    """Replaces numbers that JSON can't hold by `None`, in nested dicts and lists.

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
