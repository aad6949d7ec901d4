"""The teacher: the embedding model whose space the document index lives in.

It is needed offline only: for the documents' vectors, for the training targets, and for the rankings to distil. All
three are computed once, by as many processes as there are, and kept on disk under the teacher's fingerprint.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from .files import cache_to_write, is_sealed, say_damaged, written_whole

# Fixed for ever: a teacher is recognised by its vectors of these.
FINGERPRINT_SENTENCES = (
    "The old bridge crosses the river north of the station.",
    "How many protons does an atom of carbon have?",
    "She recorded her second album in Lisbon in 1974.",
    "Please renew your licence before the end of the month.",
    "def add(a, b): return a + b",
    "Wolves hunt in packs and mate for life.",
    "The central bank raised its interest rate by a quarter point.",
    "¿Dónde está la biblioteca más antigua de la ciudad?",
)
# Half precision and other devices move about 1 % of the 256 bits; another model moves about half of them.
FINGERPRINT_TOLERANCE = 12
# Rows computed at a time, whatever the number of processes: what else is in a batch moves the last bits of a vector.
SHARD_ROWS = 8192
SEARCHED_AT_ONCE = 1024

Advance = Callable[[int], object]  # told how many more rows are done


def same_teacher(a: str, b: str) -> bool:
    """Whether two fingerprints are one teacher's, allowing for the rounding of other devices and precisions."""
    return len(a) == len(b) and (int(a, 16) ^ int(b, 16)).bit_count() <= FINGERPRINT_TOLERANCE


class Teacher:
    """
    An embedding model by its sentence-transformers name or path.

    Args:
        name_or_path (`str`): a Hub id or a local folder.
        revision (`str`, *optional*): pins a Hub id.
        cache_dir (path, *optional*): where vectors and rankings are kept; without it nothing is.
        batch_size (`int`): texts in one forward pass.
    """

    def __init__(
        self,
        name_or_path: str,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        batch_size: int = 64,
    ):
        from sentence_transformers import SentenceTransformer  # slow to import, and not needed to compare fingerprints

        self.name_or_path, self.revision, self.batch_size = name_or_path, revision, batch_size
        self.cache_dir = Path(cache_dir) if cache_dir else None
        try:
            self.model = SentenceTransformer(name_or_path, revision=revision)
        except (OSError, ValueError) as error:
            raise OSError(f"the teacher {name_or_path!r} cannot be loaded: {' '.join(str(error).split())}") from error

    @property
    def dimension(self) -> int:
        return self.model.get_embedding_dimension()

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text that the teacher reads; the rest is cut off."""
        return self.model.max_seq_length

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, uncut."""
        tokenizer = self.model.tokenizer
        if isinstance(tokenizer, Tokenizer):  # a static embedding's
            return len(tokenizer.encode(text).ids)
        return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])

    @cached_property
    def fingerprint(self) -> str:
        """256 bits, hexadecimal: the signs of 32 coordinates of each of 8 fixed sentences, about their mean."""
        vectors = self.encode(list(FINGERPRINT_SENTENCES))
        if vectors.shape[1] < 32:
            raise ValueError(
                f"the teacher {self.name_or_path!r} has {vectors.shape[1]} dimensions; at least 32 are needed"
            )
        bits = (vectors - vectors.mean(0))[:, :32] > 0
        return np.packbits(bits.ravel()).tobytes().hex()

    def encode(
        self,
        texts: Sequence[str],
        kind: Literal["query", "document"] = "query",
        progress: str | None = None,
        half_precision: bool = False,
    ) -> np.ndarray:
        """
        Unit vectors of texts, float32 `(len(texts), dimension)`, with the teacher's own query or document prompt.

        `half_precision` computes them in bfloat16, several times as fast where the processor has it: the cosine to the
        exact vector is above 0.999, which is plenty for a training target, and nothing else should use it.

        Raises:
            `ValueError`: if a vector comes out zero or not finite, naming the text's number.
        """
        with tqdm(total=len(texts), desc=progress, unit="text", disable=progress is None) as bar:
            return self._encode(texts, kind, half_precision, bar.update)

    def _encode(
        self, texts: Sequence[str], kind: str, half_precision: bool, advance: Advance, first: int = 0
    ) -> np.ndarray:
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        device = self.model.device.type
        half_precision = half_precision and _computes_in_bfloat16(device)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        chunk = 16 * self.batch_size
        with torch.autocast(device, torch.bfloat16, enabled=half_precision):
            for begin in range(0, len(order), chunk):
                rows = order[begin : begin + chunk]
                vectors[rows] = encode(
                    [texts[i] for i in rows],
                    batch_size=self.batch_size,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                    convert_to_numpy=True,
                )
                advance(len(rows))
        bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-2))
        if len(bad):
            number = first + int(bad[0])
            raise ValueError(f"the teacher {self.name_or_path!r} gives text {number} a zero or non-finite vector")
        return vectors

    def cached(
        self, texts: Sequence[str], kind: Literal["query", "document"], progress: str, half_precision: bool = False
    ) -> np.ndarray:
        """As [`encode`], memory-mapped from the cache, computed first if it is not there; see [`cached_rows`]."""
        return self._cached(lambda rows: texts[rows], len(texts), kind, progress, half_precision)

    def documents(self, corpus: Dataset) -> np.ndarray:
        """Vectors of a corpus with columns `title` and `text`, float32 `(documents, dimension)`; as [`cached`]."""
        columns = corpus.select_columns(["title", "text"])
        return self._cached(lambda rows: document_texts(columns[rows]), len(corpus), "document", "Teacher: documents")

    def _cached(
        self,
        read: Callable[[slice], Sequence[str]],
        num_texts: int,
        kind: str,
        progress: str,
        half_precision: bool = False,
    ) -> np.ndarray:
        settings = (self.fingerprint, kind, *(["half precision"] if half_precision else []))
        texts = (text for rows in _shards(num_texts) for text in read(rows))
        return cached_rows(
            self.cache_dir,
            f"vectors-{_key(chain(settings, texts))}",
            (num_texts, self.dimension),
            np.float32,
            lambda rows, advance: self._encode(read(rows), kind, half_precision, advance, rows.start),
            progress,
            "text",
        )

    def ranking(self, targets: np.ndarray, documents: np.ndarray, k: int = 128) -> np.ndarray:
        """The `k` documents nearest to each target, best first, int32 `(targets, k)`; `k` is at most all of them."""
        k = min(k, len(documents))
        return cached_rows(
            self.cache_dir,
            f"ranking-{_key((self.fingerprint, str(k), _array_key(targets), _array_key(documents)))}",
            (len(targets), k),
            np.int32,
            lambda rows, advance: search(documents, targets[rows], k, advance)[1].astype(np.int32),
            "Ranking",
            "query",
        )


def teacher_of(config, name_or_path: str | None = None, **settings) -> Teacher:
    """
    The teacher that a model was trained towards, under another name or path if it lies elsewhere by now.

    Args:
        config (`NativeRetrievalConfig`): the model's.
        settings: further arguments of [`Teacher`].

    Raises:
        `ValueError`: if the configuration names no teacher, or this is another one.
    """
    if not config.teacher_fingerprint or not (name_or_path or config.teacher_name_or_path):
        raise ValueError("the model does not say which teacher it was trained towards; train it with train.py")
    name = name_or_path or config.teacher_name_or_path
    teacher = Teacher(name, revision=None if name_or_path else config.teacher_revision, **settings)
    if not same_teacher(teacher.fingerprint, config.teacher_fingerprint):
        raise ValueError(
            f"the teacher {name!r} has the fingerprint {teacher.fingerprint}, but the model was trained towards "
            f"{config.teacher_name_or_path!r} with {config.teacher_fingerprint}; pass that one as the teacher (--teacher)"
        )
    return teacher


def _computes_in_bfloat16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def document_texts(corpus: Dataset | Mapping[str, Sequence[str]]) -> list[str]:
    """What is embedded of a document: its title, then its text."""
    return [f"{title} {text}".strip() for title, text in zip(corpus["title"], corpus["text"], strict=True)]


def search(
    documents: np.ndarray, queries: np.ndarray, k: int, advance: Advance | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Exact inner-product search: scores and rows, best first, both `(queries, k)`. The documents are not copied."""
    documents, parts = np.ascontiguousarray(documents), []
    for begin in range(0, len(queries), SEARCHED_AT_ONCE):
        some = np.ascontiguousarray(queries[begin : begin + SEARCHED_AT_ONCE])
        parts.append(faiss.knn(some, documents, k, metric=faiss.METRIC_INNER_PRODUCT))
        if advance:
            advance(len(some))
    scores, rows = zip(*parts, strict=True)
    return np.concatenate(scores), np.concatenate(rows)


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def cached_rows(
    cache_dir: Path | None,
    name: str,
    shape: tuple[int, ...],
    dtype: type,
    compute: Callable[[slice, Advance], np.ndarray],
    progress: str | None = None,
    unit: str = "row",
) -> np.ndarray:
    """
    An array that is computed in shards of its rows, kept in `cache_dir/name.npy` and memory-mapped from there.

    Processes that make the same call share the work, whether one launcher has started them or not: each takes the next
    shard that nobody is at, and all return when the whole is there. A stopped run leaves its shards to the next. What is
    not as it was written, by its checksum, is computed anew. Memory holds a shard at a time.

    Args:
        cache_dir (`Path`, *optional*): on a file system that the processes share; without it nothing is kept.
        shape, dtype: of the whole array, `shape[0]` rows.
        compute (`Callable`): the rows of a slice; it may call its second argument with the number of rows just done.
        progress (`str`, *optional*): the name on the progress bar, which the first process of a launcher shows for all.

    Raises:
        `OSError`: if `cache_dir` cannot be written to.
    """
    shards = _shards(shape[0])
    bar = {"total": shape[0], "desc": progress, "unit": unit, "disable": progress is None or not _is_first_process()}
    if cache_dir is None:
        array = np.empty(shape, dtype)
        with tqdm(**bar) as shown:
            for rows in shards:
                array[rows] = compute(rows, shown.update)
        return array
    path = cache_dir / f"{name}.npy"
    if not is_sealed(path):
        with cache_to_write(cache_dir):
            _fill(path, shards, shape, dtype, compute, bar)
    return np.load(path, mmap_mode="r")


def _fill(
    path: Path, shards: list[slice], shape: tuple[int, ...], dtype: type, compute: Callable, bar: Mapping
) -> None:
    lock = FileLock(path.with_suffix(".lock"))
    with lock:
        if path.exists() and not is_sealed(path):
            say_damaged(path)
            path.unlink()
    while not path.exists():
        with tqdm(**bar) as shown:
            _compute_shards(path, shards, compute, shown)
        with lock:
            if not path.exists():
                _join_shards(path, shards, shape, dtype)
    # Each process does, as one that was late has made a lock anew.
    for left in chain(path.parent.glob(f"{path.stem}.[0-9]*"), path.parent.glob(f".{path.stem}.*.partial")):
        left.unlink(missing_ok=True)


def _compute_shards(path: Path, shards: list[slice], compute: Callable, bar: tqdm) -> None:
    """Returns when every shard is there, or the whole, by whichever process."""

    def finished() -> int:
        there = [rows for rows in shards if _shard(path, rows).exists()]
        return shards[-1].stop if path.exists() else sum(rows.stop - rows.start for rows in there)

    bar.update(finished())
    for wait in (False, True):  # first what nobody is at; then what others were at, if they have left it undone
        for rows in shards:
            if path.exists():
                break
            shard = _shard(path, rows)
            try:
                held = FileLock(shard.with_suffix(".lock"), blocking=wait).acquire()
            except Timeout:
                continue
            with held:
                if not path.exists() and not shard.exists():
                    array = compute(rows, bar.update)
                    with written_whole(shard, sealed=True) as partial, partial.open("wb") as file:
                        np.save(file, array)
            bar.update(finished() - bar.n)
    bar.update(finished() - bar.n)


def _join_shards(path: Path, shards: list[slice], shape: tuple[int, ...], dtype: type) -> None:
    """Writes the whole unless a shard is damaged, which is then gone."""
    damaged = [shard for rows in shards if not is_sealed(shard := _shard(path, rows))]
    for shard in damaged:
        say_damaged(shard)
        shard.unlink(missing_ok=True)
    if damaged:
        return
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with written_whole(path, sealed=True) as partial, partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows in shards:
            file.write(np.load(_shard(path, rows)).data)


def _shards(num_rows: int) -> list[slice]:
    return [slice(begin, min(begin + SHARD_ROWS, num_rows)) for begin in range(0, num_rows, SHARD_ROWS)]


def _shard(path: Path, rows: slice) -> Path:
    return path.with_suffix(f".{rows.start:012d}.npy")


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"  # what torchrun and accelerate launch set


def _key(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:24]


def _array_key(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
