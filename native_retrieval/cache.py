# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""Files on disk: atomic writes, checksums, and costly arrays that many processes compute together in shards.

Processes that want the same file share the work, whether or not one launcher has started them. Each takes the next
shard that no other process works on, and all return when the file is complete. If a run stops, the next run keeps its
finished shards. A file or shard whose checksum does not match is computed again.
"""

import hashlib
import io
import math
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

Advance = Callable[[int], object]  # takes the number of rows that were just finished
Shard = Sequence[slice]  # rows of an array

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


# Whole files


def sha256(path: str | os.PathLike) -> str:
    """The checksum of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_lfs_pointer(path: str | os.PathLike) -> bool:
    """Whether a file is only a Git LFS pointer: a few lines that `git clone` leaves when Git LFS is not installed."""
    with open(path, "rb") as file:
        return file.read(len(_LFS_POINTER)) == _LFS_POINTER


@contextmanager
def atomic_write(path: str | os.PathLike, sealed: bool = False) -> Iterator[Path]:
    """
    Yields a temporary path beside `path`. The file there is renamed to `path` when the block ends, or removed if it fails.

    So a killed process leaves no half-written `path`, and two processes that write the same file do not mix their
    contents. `sealed` also writes the file's checksum beside it, for [`is_sealed`].
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
    """Writes a file's checksum beside it."""
    with atomic_write(_seal_of(path)) as partial:
        partial.write_text(checksum + "\n")


def is_sealed(path: Path) -> bool:
    """Whether a file exists, has a checksum beside it, and matches it."""
    try:
        return _seal_of(path).read_text().strip() == sha256(path)
    except (OSError, UnicodeDecodeError):
        return False


def is_damaged(path: Path) -> bool:
    """Whether a file has a checksum beside it and does not match it."""
    return _seal_of(path).exists() and not is_sealed(path)


@contextmanager
def cache_to_write(cache_dir: str | os.PathLike) -> Iterator[None]:
    """
    Makes the folder of a cache, for a block that writes to it.

    Raises:
        `OSError`: in one line, if the folder cannot be written to (for example read-only or full).
    """
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno is None:  # raised by this project, and already clear
            raise
        raise OSError(
            f"the cache {cache_dir} cannot be written to ({error.strerror}); free some space on that disk, "
            "or set another cache_dir; what was finished is kept"
        ) from error


def _say_damaged(path: Path) -> None:
    print(f"{path} is not as it was written (another checksum, or none), and is computed again", file=sys.stderr)


def _seal_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


# Arrays in shards


def slices(total: int, size: int) -> list[slice]:
    """Splits `total` rows into slices of `size` rows; the last one may be shorter."""
    return [slice(begin, min(begin + size, total)) for begin in range(0, total, size)]


def num_rows(rows: slice) -> int:
    return rows.stop - rows.start


def cached_rows(
    cache_dir: Path | None,
    name: str,
    shape: tuple[int, ...],
    dtype: type,
    shards: Sequence[Shard],
    compute: Callable[[Shard, Advance], Iterable[np.ndarray]],
    otherwise: str = "",
    **bar,
) -> np.ndarray:
    """
    An array whose rows are computed in shards. It is kept in `cache_dir/name.npy` and memory-mapped from there.

    Args:
        cache_dir (`Path`, *optional*): on a file system that the processes share. Without it, nothing is kept.
        shape, dtype: of the whole array, which has `shape[0]` rows.
        shards (`list[list[slice]]`): the rows that are computed together; each row is in one shard. The shards must
            depend on the data only and not on the number of processes, because a row's batch changes its last bits.
        compute (`Callable`): yields the rows of each slice of a shard, in order; memory holds one slice at a time. It
            may call its second argument with the number of rows that it has just finished.
        otherwise (`str`): another way out for the error message of a full disk.
        bar: further arguments of tqdm. The first process of a launcher shows one bar for all processes.

    Raises:
        `OSError`: if the disk is full, or `cache_dir` cannot be written to.
    """
    if cache_dir is None:
        array = np.empty(shape, dtype)
        with _bar(shape[0], bar) as shown:
            for shard in shards:
                for rows, values in zip(shard, compute(shard, shown.update), strict=True):
                    array[rows] = values
        return array
    path = cache_dir / f"{name}.npy"
    array_file = _ArrayFile(path, shape, dtype)

    def write(number: int, advance: Advance) -> str:
        array_file.check_room(otherwise)
        return array_file.write(shards[number], compute(shards[number], advance))

    def join(checksums: list[str]) -> list[int]:
        damaged = [i for i, wanted in enumerate(checksums) if array_file.checksum(shards[i]) != wanted]
        if not damaged:
            array_file.finish()
        return damaged

    make_in_shards(path, [sum(map(num_rows, shard)) for shard in shards], write, join, **bar)
    return np.load(path, mmap_mode="r")


def make_in_shards(
    path: Path,
    sizes: Sequence[int],
    compute: Callable[[int, Advance], str],
    join: Callable[[list[str]], Sequence[int]],
    **bar,
) -> None:
    """
    Makes a file from shards, unless it exists already and matches its checksum.

    Args:
        sizes (`list[int]`): rows of each shard, for the progress bar.
        compute (`Callable`): computes the shard with a given number, and returns a short text about it for `join`. It may
            call its second argument with the number of rows that it has just finished.
        join (`Callable`): takes the texts of all shards. It writes the file and its checksum and returns an empty list,
            or returns the numbers of the damaged shards.
        bar: further arguments of tqdm. The first process of a launcher shows one bar for all processes.

    Raises:
        `OSError`: if the folder cannot be written to.
    """
    if is_sealed(path):
        return
    lock = FileLock(path.with_suffix(".lock"))
    notes = [path.with_suffix(f".{number:06d}.shard") for number in range(len(sizes))]
    with cache_to_write(path.parent):
        with lock:
            if path.exists() and not is_sealed(path):
                _say_damaged(path)
                path.unlink()
        while not path.exists():
            with _bar(sum(sizes), bar) as shown:
                _compute_shards(path, notes, sizes, compute, shown)
            with lock:
                if not path.exists():
                    _join_shards(notes, join)
        # Every process cleans up, because a late one has made a new lock.
        for left in chain(path.parent.glob(f"{path.stem}.[0-9]*"), path.parent.glob(f".{path.stem}.*.partial")):
            left.unlink(missing_ok=True)


def _compute_shards(path: Path, notes: list[Path], sizes: Sequence[int], compute: Callable, bar: tqdm) -> None:
    """Returns when every shard exists, or the whole file, whichever process has written it."""

    def catch_up() -> None:
        if not bar.disable:
            there = sum(size for note, size in zip(notes, sizes, strict=True) if note.exists())
            bar.update((sum(sizes) if path.exists() else there) - bar.n)

    catch_up()
    for wait in (False, True):  # first the free shards, then those that another process has left unfinished
        for number, note in enumerate(notes):
            if path.exists():
                break
            if note.exists():
                continue
            try:
                held = FileLock(note.with_suffix(".lock"), blocking=wait).acquire()
            except Timeout:
                continue
            with held:
                if not note.exists() and not path.exists():  # in this order: notes are removed once the file exists
                    text = compute(number, bar.update)
                    with atomic_write(note, sealed=True) as partial:
                        partial.write_text(text)
            catch_up()
    catch_up()


def _join_shards(notes: list[Path], join: Callable) -> None:
    """Makes the whole file, or forgets the damaged shards."""
    damaged = [note for note in notes if not is_sealed(note)]
    if not damaged:
        damaged = [notes[number] for number in join([note.read_text() for note in notes])]
    for note in damaged:
        _say_damaged(note)
        note.unlink(missing_ok=True)


class _ArrayFile:
    """
    The file of an array while processes write its shards, each in its place, so that the disk never holds it twice.

    It is written with `write`, not through a memory map: on a full disk, a map would end the process without an error.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type):
        self.whole, self.partial, self.dtype = path, path.with_name(f".{path.name}.partial"), np.dtype(dtype)
        header = io.BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        self.header = header.getvalue()
        self.num_rows, self.row_bytes = shape[0], self.dtype.itemsize * math.prod(shape[1:])

    def check_room(self, otherwise: str) -> None:
        """Raises `OSError` if the disk has no room; called before the first shard is computed."""
        needed, free = self.num_rows * self.row_bytes, shutil.disk_usage(self.whole.parent).free
        if not self.partial.exists() and needed > free:
            raise OSError(
                f"{self.whole.name} needs {needed / 1e9:.1f} GB, {self.whole.parent} has {free / 1e9:.1f} GB free; "
                f"free some or set another cache_dir{otherwise}"
            )

    def write(self, shard: Shard, arrays: Iterable[np.ndarray]) -> str:
        """Returns the shard's checksum."""
        digest = hashlib.sha256()
        with self._opened() as file:
            for rows, array in zip(shard, arrays, strict=True):
                values = np.ascontiguousarray(array, self.dtype)
                file.seek(self._place(rows))
                file.write(values)
                digest.update(values)
        return digest.hexdigest()

    def checksum(self, shard: Shard) -> str:
        """The checksum of the shard on disk."""
        digest = hashlib.sha256()
        with self._opened() as file:
            for rows in shard:
                file.seek(self._place(rows))
                digest.update(file.read(self.row_bytes * num_rows(rows)))
        return digest.hexdigest()

    def finish(self) -> None:
        with self._opened() as file:
            file.write(self.header)
        seal(self.whole, sha256(self.partial))
        os.replace(self.partial, self.whole)

    def _opened(self) -> BinaryIO:
        self.partial.touch()  # keeps the content: another process may be writing to it
        return self.partial.open("r+b")

    def _place(self, rows: slice) -> int:
        return len(self.header) + self.row_bytes * rows.start


def _bar(total: int, options: dict) -> tqdm:
    first = os.environ.get("RANK", "0") == "0"  # set by torchrun and accelerate launch
    return tqdm(total=total, disable=not first, **options)
