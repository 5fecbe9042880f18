"""Files that are whole wherever they are there."""

import contextlib
import os
from pathlib import Path

from support.flags import fail


def write_whole(path: Path, data: bytes | str, previous: Path | None = None) -> None:
    """Writes a file under another name, to the disk, and renames it: it is whole wherever it is there. What
    was there before is kept as `previous`, if that is given."""
    temporary = path.with_name(f"{path.name}.tmp")
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(temporary.unlink, missing_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)


def check_can_be_written(flag: str, path: Path) -> None:
    """Refuses a file that cannot be written later, where its folder may not be there yet. Makes nothing."""
    folder = next(parent for parent in path.resolve().parents if parent.exists())
    problem = None
    if path.is_dir():
        problem = "it is a folder"
    elif not folder.is_dir():
        problem = f"{folder} is no folder"
    elif not os.access(folder, os.W_OK):
        problem = f"{folder} is read-only"
    if problem:
        fail(f"--{flag} {path} cannot be written ({problem}): name another file")
