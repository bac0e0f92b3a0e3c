# SPDX-License-Identifier: Apache-2.0
"""Write files so that a kill at any moment leaves the old file or the new one, never a partial one."""

from __future__ import annotations

import math
import os
import tempfile
from itertools import count
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` next to `path`, flush it to the disk and rename it to `path`.

    Args:
        path: Where to write. Its folder is created if missing.
        content: The whole content of the file.

    Raises:
        OSError: If the folder can't be created or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
    if not path.exists():
        return None
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in count(1))
    try:
        return path.rename(next(name for name in names if not name.exists()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} is there already, the report of an earlier run or of another user, and can't be renamed "
            f"({error.strerror}). Remove it, or pass another folder as `report_dir`."
        ) from error


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
