# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""Files that are whole or not there: written aside and renamed, with a checksum that tells damage later."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sha256(path: str | os.PathLike) -> str:
    """The checksum of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def written_whole(path: str | os.PathLike, sealed: bool = False) -> Iterator[Path]:
    """
    A place beside `path` to write a file to, which takes the name `path` when the block ends, and goes if it fails.

    A killed process leaves no half-written `path`, and two processes that write the same one do not mix. `sealed` puts
    the checksum beside it, for [`is_sealed`].
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        if sealed:
            seal(path, sha256(partial))
        os.replace(partial, path)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise


def seal(path: Path, checksum: str) -> None:
    """Writes a checksum beside the file that it is of."""
    with written_whole(_seal_of(path)) as partial:
        partial.write_text(checksum + "\n")


def is_sealed(path: Path) -> bool:
    """Whether a file is there, with its checksum beside it, and is as it was written."""
    try:
        return _seal_of(path).read_text().strip() == sha256(path)
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
