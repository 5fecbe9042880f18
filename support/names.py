"""Names of experiments and environments as parts of the names of files and folders."""

import re
import zlib


def no_flag(path) -> str:
    """A path as a word of a command line that no program takes for a flag."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def slug(name: str) -> str:
    """A name in letters, digits, points and dashes of ASCII; whatever else is in it becomes dashes. Names
    with letters from elsewhere, which would all look alike then, get a checksum that keeps them apart."""
    text = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    return text if name.isascii() else f"{text}-{zlib.crc32(name.encode('utf-8', 'replace')):08x}"
