# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""Files that are whole or not there: written aside and renamed, with a checksum that tells damage later."""

import hashlib
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256(path: str | os.PathLike) -> str:
    """The checksum of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_write(path: str | os.PathLike, sealed: bool = False) -> Iterator[Path]:
    """
    A place beside `path` to write a file to, which takes the name `path` when the block ends, and goes if it fails.

    A killed process leaves no half-written `path`, and two processes that write the same one do not mix. `sealed` puts
    the checksum beside it, for [`is_sealed`].
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        if sealed:
            seal(path, sha256(partial))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def seal(path: Path, checksum: str) -> None:
    """Writes a checksum beside the file that it is of."""
    with atomic_write(_seal_of(path)) as partial:
        partial.write_text(checksum + "\n")


def is_sealed(path: Path) -> bool:
    """Whether a file is there, with its checksum beside it, and is as it was written."""
    try:
        return _seal_of(path).read_text().strip() == sha256(path)
    except (OSError, UnicodeDecodeError):
        return False


def is_damaged(path: Path) -> bool:
    """Whether a file is another than the checksum beside it is of; without one, nothing is known of it."""
    return _seal_of(path).exists() and not is_sealed(path)


def say_damaged(path: Path) -> None:
    """Tells, on stderr, why a cached file is computed again."""
    print(f"{path} is not as it was written (another checksum, or none), and is computed again", file=sys.stderr)


@contextmanager
def cache_to_write(cache_dir: str | os.PathLike) -> Iterator[None]:
    """
    Makes a cache's folder, if it is not there, for a block that writes to it.

    Raises:
        `OSError`: in one line, if it cannot be written to, because it is read-only or full, for example.
    """
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno is None:  # says already what is wrong
            raise
        raise OSError(
            f"the cache {cache_dir} cannot be written to ({error.strerror}); free some space on that disk, "
            "or set another cache_dir; what was finished is kept"
        ) from error


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
