"""Files that are whole wherever they are there."""

import contextlib
import os
from pathlib import Path


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
