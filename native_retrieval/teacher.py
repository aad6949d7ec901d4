"""The teacher: the embedding model whose space the document index lives in.

It is needed offline only: for the documents' vectors, the training targets, and the rankings to distil. All three are
computed once, by all processes together, and kept on disk under the teacher's fingerprint.
"""

import copy
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
from tokenizers import Tokenizer
from tqdm.auto import tqdm

from .cache import Advance, cached_rows, slices
from .loading import float32_is_faster

# Never change these: a teacher is recognised by its vectors of them.
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
# Half precision and other devices change about 1 % of the 256 bits; another model changes about half of them.
FINGERPRINT_TOLERANCE = 12
# Rows of a shard, for any number of processes, because the other texts in a batch change the last bits of a vector.
SHARD_ROWS = 8192
SEARCHED_AT_ONCE = 1024


def same_teacher(a: str, b: str) -> bool:
    """Whether two fingerprints are one teacher's, allowing for the rounding of other devices and precisions."""
    return len(a) == len(b) and (int(a, 16) ^ int(b, 16)).bit_count() <= FINGERPRINT_TOLERANCE


class Teacher:
    """
    An embedding model by its sentence-transformers name or path.

    Args:
        name_or_path (`str`): a Hub id or a local folder.
        revision (`str`, *optional*): pins a Hub id.
        cache_dir (path, *optional*): where vectors and rankings are kept. Without it, they are not kept.
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
    def tokenizer(self):
        """The teacher's own tokenizer."""
        return self.model.tokenizer

    @property
    def transformer(self):
        """The teacher's transformer, if it is one."""
        return getattr(self.model[0], "auto_model", None)

    @property
    def max_seq_length(self) -> int | None:
        """How many tokens of a text the teacher reads; the rest is cut off."""
        return self.model.max_seq_length

    def count_tokens(self, text: str) -> int:
        """Tokens of a text as a query, with the teacher's prompt for queries if it has one, and without truncation."""
        text = f"{self.model.prompts.get('query') or ''}{text}"
        tokenizer = self.tokenizer
        if isinstance(tokenizer, Tokenizer):  # a static embedding's
            return len(tokenizer.encode(text).ids)
        return len(tokenizer(text, truncation=False, verbose=False)["input_ids"])

    @cached_property
    def fingerprint(self) -> str:
        """256 bits, hexadecimal: the signs of 32 coordinates of 8 fixed sentences' vectors, after centring them."""
        vectors = self.encode(list(FINGERPRINT_SENTENCES))
        if vectors.shape[1] < 32:
            raise ValueError(
                f"the teacher {self.name_or_path!r} has {vectors.shape[1]} dimensions; at least 32 are needed"
            )
        bits = (vectors - vectors.mean(0))[:, :32] > 0
        return np.packbits(bits.ravel()).tobytes().hex()

    @property
    def identity(self) -> str:
        """The key of its vectors in caches. The fingerprint is of short texts, so the length limit and prompts belong to it."""
        return json.dumps([self.fingerprint, self.max_seq_length, self.model.prompts])

    def encode(
        self,
        texts: Sequence[str],
        kind: Literal["query", "document"] = "query",
        progress: str | None = None,
        half_precision: bool = False,
    ) -> np.ndarray:
        """
        Unit vectors of texts, float32 `(len(texts), dimension)`, with the teacher's own query or document prompt.

        `half_precision` computes them in bfloat16, which is several times faster on processors that have it. The cosine to
        the exact vector is above 0.99. That is enough for a training target; nothing else should use it.

        Raises:
            `ValueError`: if a vector comes out zero or not finite, naming the text's number.
        """
        with tqdm(total=len(texts), desc=progress, unit="text", disable=progress is None) as bar:
            return self._encode(texts, kind, half_precision, bar.update)

    @cached_property
    def _half_model(self):
        return copy.deepcopy(self.model).to(torch.bfloat16)

    def _encode(
        self, texts: Sequence[str], kind: str, half_precision: bool, advance: Advance, first: int = 0
    ) -> np.ndarray:
        model = self._half_model if half_precision and _computes_in_bfloat16(self.model.device.type) else self.model
        encode = model.encode_query if kind == "query" else model.encode_document
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        chunk = 16 * self.batch_size
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
        """Like [`encode`], but memory-mapped from the cache, and computed only if it is not there; see [`cached_rows`]."""
        return self._cached(lambda rows: texts[rows], len(texts), kind, progress, half_precision)

    def documents(self, corpus: Dataset) -> np.ndarray:
        """Vectors of a corpus with columns `title` and `text`, float32 `(documents, dimension)`; like [`cached`]."""
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
        settings = (self.identity, kind, *(["half precision"] if half_precision else []))
        shards = slices(num_texts, SHARD_ROWS)
        texts = (text for rows in shards for text in read(rows))
        return cached_rows(
            self.cache_dir,
            f"vectors-{_key(chain(settings, texts))}",
            (num_texts, self.dimension),
            np.float32,
            [[rows] for rows in shards],
            lambda shard, advance: (
                self._encode(read(rows), kind, half_precision, advance, rows.start) for rows in shard
            ),
            desc=progress,
            unit="text",
        )

    def ranking(self, targets: np.ndarray, documents: np.ndarray, k: int = 128) -> np.ndarray:
        """The `k` documents nearest to each target, best first, int32 `(targets, k)`; `k` is at most all of them."""
        k = min(k, len(documents))
        return cached_rows(
            self.cache_dir,
            f"ranking-{_key((self.fingerprint, str(k), _array_key(targets), _array_key(documents)))}",
            (len(targets), k),
            np.int32,
            [[rows] for rows in slices(len(targets), SHARD_ROWS)],
            lambda shard, advance: (search(documents, targets[rows], k, advance)[1] for rows in shard),
            desc="Ranking",
            unit="query",
        )


def teacher_of(config, name_or_path: str | None = None, **settings) -> Teacher:
    """
    The teacher that a model was trained towards. Give `name_or_path` if it has another name or path now.

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
    return device == "cpu" and not float32_is_faster()


def document_texts(corpus: Dataset | Mapping[str, Sequence[str]]) -> list[str]:
    """The text of a document that is embedded: its title, then its text."""
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


def _key(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:24]


def _array_key(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
