"""The teacher: the embedding model whose space the document index lives in.

It is needed offline only: for the documents' vectors, for the training targets, and for the rankings to distil. All
three are computed once and kept on disk under the teacher's fingerprint.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tqdm.auto import tqdm

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
        self.model = SentenceTransformer(name_or_path, revision=revision)

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
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        device = self.model.device.type
        half_precision = half_precision and _computes_in_bfloat16(device)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        chunk = 16 * self.batch_size
        with (
            tqdm(total=len(texts), desc=progress, unit="text", disable=progress is None) as bar,
            torch.autocast(device, torch.bfloat16, enabled=half_precision),
        ):
            for begin in range(0, len(order), chunk):
                rows = order[begin : begin + chunk]
                vectors[rows] = encode(
                    [texts[i] for i in rows],
                    batch_size=self.batch_size,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                    convert_to_numpy=True,
                )
                bar.update(len(rows))
        bad = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-2))
        if len(bad):
            raise ValueError(f"the teacher {self.name_or_path!r} gives text {bad[0]} a zero or non-finite vector")
        return vectors

    def cached(
        self, texts: Sequence[str], kind: Literal["query", "document"], progress: str, half_precision: bool = False
    ) -> np.ndarray:
        """As [`encode`], memory-mapped from the cache, computed first if it is not there."""
        key = _key(self.fingerprint, kind, *(["half precision"] if half_precision else []), *texts)
        return cached_array(
            self.cache_dir, f"vectors-{key}", lambda: self.encode(texts, kind, progress, half_precision)
        )

    def documents(self, corpus: Dataset) -> np.ndarray:
        """Vectors of a corpus with columns `title` and `text`, float32 `(documents, dimension)`."""
        return self.cached(document_texts(corpus), "document", "Teacher: documents")

    def ranking(self, targets: np.ndarray, documents: np.ndarray, k: int = 128) -> np.ndarray:
        """The `k` documents nearest to each target, best first, int32 `(targets, k)`; `k` is at most all of them."""
        k = min(k, len(documents))
        key = _key(self.fingerprint, str(k), _array_key(targets), _array_key(documents))
        return cached_array(self.cache_dir, f"ranking-{key}", lambda: search(documents, targets, k)[1].astype(np.int32))


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


def document_texts(corpus: Dataset) -> list[str]:
    """What is embedded of a document: its title, then its text."""
    return [f"{title} {text}".strip() for title, text in zip(corpus["title"], corpus["text"], strict=True)]


def search(documents: np.ndarray, queries: np.ndarray, k: int, progress: str | None = "Ranking") -> tuple:
    """Exact inner-product search: scores and rows, both `(queries, k)`."""
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(np.ascontiguousarray(documents))
    parts = []
    with tqdm(total=len(queries), desc=progress, unit="query", disable=progress is None) as bar:
        for begin in range(0, len(queries), 1024):
            parts.append(index.search(np.ascontiguousarray(queries[begin : begin + 1024]), k))
            bar.update(len(parts[-1][0]))
    scores, rows = zip(*parts, strict=True)
    return np.concatenate(scores), np.concatenate(rows)


def cached_array(cache_dir: Path | None, name: str, compute) -> np.ndarray:
    """`compute()`, kept in `cache_dir/name.npy` and memory-mapped from there; a damaged file is computed anew."""
    if cache_dir is None:
        return compute()
    path = cache_dir / f"{name}.npy"
    try:
        return np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        pass
    array = compute()
    cache_dir.mkdir(parents=True, exist_ok=True)
    # Two processes may both be here: each writes a file of its own, and the rename is atomic.
    handle, partial = tempfile.mkstemp(dir=cache_dir, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return np.load(path, mmap_mode="r")


def _key(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:24]


def _array_key(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
