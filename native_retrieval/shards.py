"""Costly work in shards, by as many processes as there are, into one file on disk.

Processes that want the same file share the work, whether one launcher has started them or not: each takes the next
shard that nobody is at, and all return when the file is there. A stopped run leaves its shards to the next. What is not
as it was written, by its checksum, is computed anew.
"""

import hashlib
import io
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from .files import atomic_write, cache_to_write, is_sealed, say_damaged, seal, sha256

Advance = Callable[[int], object]  # told how many more rows are done
Shard = Sequence[slice]  # of an array's rows


def slices(total: int, size: int) -> list[slice]:
    """Neighbours of `total` rows, `size` at a time."""
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
    An array whose rows are computed in shards, kept in `cache_dir/name.npy` and memory-mapped from there.

    Args:
        cache_dir (`Path`, *optional*): on a file system that the processes share; without it nothing is kept.
        shape, dtype: of the whole array, `shape[0]` rows.
        shards (`list[list[slice]]`): rows that are computed together, all of them once. To be chosen by the data alone,
            and not by the number of processes: what else is computed with a row may move its last bits.
        compute (`Callable`): gives the rows of each slice of a shard, in their order, which memory holds one at a time;
            it may call its second argument with the number of rows just done.
        otherwise (`str`): what else can be done, in the words of the error, if the disk has no room.
        bar: further arguments of tqdm. The first process of a launcher shows one bar for all.

    Raises:
        `OSError`: if there is no room, or `cache_dir` cannot be written to.
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
    Makes a file of what is computed in shards, unless it is there, and as it was written.

    Args:
        sizes (`list[int]`): rows of each shard, as the progress bar counts them.
        compute (`Callable`): computes the shard of a number, and returns in a short text what `join` is to know of it;
            it may call its second argument with the number of rows just done.
        join (`Callable`): writes the file and its checksum, given the texts of all shards; or gives the numbers of
            those that it finds damaged.
        bar: further arguments of tqdm. The first process of a launcher shows one bar for all.

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
                say_damaged(path)
                path.unlink()
        while not path.exists():
            with _bar(sum(sizes), bar) as shown:
                _compute_shards(path, notes, sizes, compute, shown)
            with lock:
                if not path.exists():
                    _join_shards(notes, join)
        # Each process does, as one that was late has made a lock anew.
        for left in chain(path.parent.glob(f"{path.stem}.[0-9]*"), path.parent.glob(f".{path.stem}.*.partial")):
            left.unlink(missing_ok=True)


def _compute_shards(path: Path, notes: list[Path], sizes: Sequence[int], compute: Callable, bar: tqdm) -> None:
    """Returns when every shard is there, or the whole, by whichever process."""

    def catch_up() -> None:
        if not bar.disable:
            there = sum(size for note, size in zip(notes, sizes, strict=True) if note.exists())
            bar.update((sum(sizes) if path.exists() else there) - bar.n)

    catch_up()
    for wait in (False, True):  # first what nobody is at; then what others were at, if they have left it undone
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
                if not note.exists() and not path.exists():  # in this order: notes go when the whole is there
                    text = compute(number, bar.update)
                    with atomic_write(note, sealed=True) as partial:
                        partial.write_text(text)
            catch_up()
    catch_up()


def _join_shards(notes: list[Path], join: Callable) -> None:
    """Makes the whole, unless a shard is damaged, which is then forgotten."""
    damaged = [note for note in notes if not is_sealed(note)]
    if not damaged:
        damaged = [notes[number] for number in join([note.read_text() for note in notes])]
    for note in damaged:
        say_damaged(note)
        note.unlink(missing_ok=True)


class _ArrayFile:
    """
    An array's file while processes write its shards, each into its place: the disk need not hold the array twice.

    Written, and not through a map: on a full disk, a map's pages would end the process without a word.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type):
        self.whole, self.partial, self.dtype = path, path.with_name(f".{path.name}.partial"), np.dtype(dtype)
        header = io.BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        self.header = header.getvalue()
        self.num_rows, self.row_bytes = shape[0], self.dtype.itemsize * math.prod(shape[1:])

    def check_room(self, otherwise: str) -> None:
        """Before the first shard is computed; raises `OSError`."""
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
        """Of the shard as it is on disk."""
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
        self.partial.touch()  # and not as new: another process may be writing to it
        return self.partial.open("r+b")

    def _place(self, rows: slice) -> int:
        return len(self.header) + self.row_bytes * rows.start


def _bar(total: int, options: dict) -> tqdm:
    first = os.environ.get("RANK", "0") == "0"  # what torchrun and accelerate launch set
    return tqdm(total=total, disable=not first, **options)
