"""The teacher's document index: documents, FAISS file and `index.json`, in one directory.

`index.json` says which teacher's vectors lie in the index: a model trained towards another teacher gets an error instead
of noise. The FAISS file is memory-mapped, so that opening a large index costs no more than its checksum.
"""

import json
import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import datasets
import faiss
import numpy as np
from filelock import FileLock

from .cache import sha256
from .teacher import same_teacher

FORMAT_VERSION = 3
EXACT_UP_TO = 100_000  # vectors: a scan of these takes some milliseconds; `benchmarks/index.py` has the figures
APPROXIMATE = ("HNSW32,SQfp16", "efSearch=128")
PARTS = ("index.json", "index.faiss", "documents")
FIELDS = {"teacher_name", "teacher_fingerprint", "dimension", "num_documents", "search_parameters", "checksums"}
REQUIRED_COLUMNS = ("_id", "title", "text")
NORM_TOLERANCE = 1e-2  # lets half-precision vectors pass


def label(document: Mapping[str, str]) -> str:
    """What people read for a document: its title, or the beginning of a text that has none."""
    text = " ".join(document["text"].split())
    return document["title"].strip() or (text if len(text) <= 60 else f"{text[:59]}…")


class IndexMismatchError(ValueError):
    """An index does not belong to the model, or its files do not belong together."""


def default_kind(num_documents: int) -> tuple[str, str]:
    """FAISS's factory string and search parameters: exact while that is fast, then a graph over half-precision vectors."""
    return ("Flat", "") if num_documents <= EXACT_UP_TO else APPROXIMATE


class DocumentIndex:
    """Documents and their vectors, searched by inner product (cosine, as the vectors have length 1).

    Make one with `DocumentIndex.build` or `DocumentIndex.load`.

    Attributes:
        documents: the documents, memory-mapped, with columns `_id`, `title`, `text`; row i has vector i.
        vectors: the FAISS index.
        info: the content of `index.json`: `format_version`, `teacher_name`, `teacher_fingerprint`, `dimension`,
            `metric`, `kind` and `search_parameters` (of FAISS), `num_documents`, and `checksums`: the sha256 of every
            other file of the index, by its path in the directory.
    """

    def __init__(self, documents: datasets.Dataset, vectors: faiss.Index, info: dict[str, Any]) -> None:
        self.documents, self.vectors, self.info = documents, vectors, info

    @cached_property
    def ids(self) -> list[str]:
        """The document ids, in row order."""
        return list(self.documents["_id"])

    def __len__(self) -> int:
        return len(self.documents)

    @classmethod
    def build(
        cls,
        documents: datasets.Dataset,
        vectors: np.ndarray,
        teacher_fingerprint: str,
        teacher_name: str,
        output_dir: str | os.PathLike[str],
        *,
        kind: tuple[str, str] | None = None,
        overwrite: bool = False,
    ) -> "DocumentIndex":
        """Writes an index and loads it. The directory appears complete or not at all; a second process waits.

        Args:
            documents: columns `_id` (unique), `title`, `text`.
            vectors: `(num_documents, dimension)`, float32, L2-normalised, row i for document i.
            teacher_fingerprint: which vectors these are, see `teacher.py`.
            teacher_name: the teacher's name, for people.
            output_dir: the index directory.
            kind: FAISS's factory string and search parameters, such as `("HNSW32,SQfp16", "efSearch=128")`; by default
                what `default_kind` takes for so many documents.
            overwrite: replace the index that stands in `output_dir`.

        Raises:
            ValueError: documents or vectors that do not fit; the message names the document.
            FileExistsError: `output_dir` is not empty, and holds no index, or more than one, or `overwrite` is off.
        """
        target = Path(output_dir)
        _check_target(target, overwrite)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        check_documents(documents, vectors)

        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.building")
        staging, replaced = aside / "new", aside / "old"
        with FileLock(target.with_name(f".{target.name}.lock")):
            if replaced.exists() and not target.exists():  # a build was killed right between the two renames below
                os.replace(replaced, target)
            shutil.rmtree(aside, ignore_errors=True)
            _check_target(target, overwrite)
            try:
                staging.mkdir(parents=True)
                _write(staging, documents, vectors, kind, teacher_fingerprint, teacher_name)
                if target.exists():
                    os.replace(target, replaced)
                os.replace(staging, target)
            except BaseException:
                if replaced.exists() and not target.exists():
                    os.replace(replaced, target)
                raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        return cls.load(target)

    @classmethod
    def load(cls, index_dir: str | os.PathLike[str]) -> "DocumentIndex":
        """Opens an index and checks that it is whole.

        Raises:
            FileNotFoundError: a part of the index is missing.
            IndexMismatchError: the parts do not belong together, or another version wrote them.
        """
        path = Path(index_dir)
        for part in PARTS:
            if not (path / part).exists():
                raise FileNotFoundError(
                    f"{path} has no {part}, wanted index.json, index.faiss and documents/; "
                    "pass a directory that DocumentIndex.build wrote, or build it again."
                )
        try:
            info = json.loads((path / "index.json").read_text(encoding="utf-8"))
            version = info["format_version"]
            whole = version != FORMAT_VERSION or info.keys() >= FIELDS
        except (ValueError, TypeError, KeyError):  # not JSON, no object, or another one
            whole = False
        if not whole:
            _mismatch(f"{path}/index.json", "not readable", "what DocumentIndex.build writes")
        if version != FORMAT_VERSION:
            raise IndexMismatchError(
                f"{path}/index.json: format_version is {version}, wanted {FORMAT_VERSION}; build it again, "
                "or open it with the release that wrote it."
            )
        # FAISS reads no file that is not vouched for.
        for name, wanted in {"index.faiss": "", **info["checksums"]}.items():
            if not (path / name).is_file():
                _mismatch(f"{path}/{name}", "missing", "as it was written")
            if (checksum := sha256(path / name)) != wanted:
                _mismatch(f"{path}/{name}: truncated or changed, sha256", checksum[:12], wanted[:12])
        documents = datasets.load_from_disk(path / "documents")
        if len(documents) != info["num_documents"]:
            _mismatch(f"{path}/documents: number of rows", len(documents), info["num_documents"])
        vectors = faiss.read_index(str(path / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)
        if info["search_parameters"]:
            faiss.ParameterSpace().set_index_parameters(vectors, info["search_parameters"])
        return cls(documents, vectors, info)

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest documents of every query.

        Args:
            vectors: `(num_queries, dimension)`, L2-normalised for cosine scores.
            k: documents a query; more than the index holds gives all of them.

        Returns:
            `scores`, float32, descending, and `rows` of `documents`, int64, both `(num_queries, min(k, len(self)))`. An
            approximate index may find fewer; the rows behind them are -1.

        Raises:
            ValueError: k below 1, another shape, or a vector that is zero or not finite.
        """
        vectors = check_query_vectors(vectors, k, self.info)
        if len(vectors) == 0:
            empty = (0, min(k, len(self)))
            return np.empty(empty, dtype=np.float32), np.empty(empty, dtype=np.int64)
        return self.vectors.search(vectors, min(k, len(self)))

    def check_model(self, config: Any) -> None:
        """Raises `IndexMismatchError` unless a model with this `NativeRetrievalConfig` may search this index."""
        check_model(self.info, config)


def _write(
    folder: Path,
    documents: datasets.Dataset,
    vectors: np.ndarray,
    kind: tuple[str, str] | None,
    teacher_fingerprint: str,
    teacher_name: str,
) -> None:
    documents.save_to_disk(folder / "documents")
    factory, search_parameters = kind or default_kind(len(documents))
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"FAISS knows no index of kind {factory!r}; give one such as {APPROXIMATE[0]!r}") from error
    if "HNSW" in factory:  # FAISS's 40 leaves a few vectors that no search reaches
        faiss.ParameterSpace().set_index_parameter(index, "efConstruction", 80)
    if not index.is_trained:
        index.train(vectors)
    index.add(vectors)
    try:
        faiss.write_index(index, str(folder / "index.faiss"))
    except RuntimeError as error:  # a full disk, among others; it spells out the line of C++ too
        raise OSError(f"{folder}/index.faiss could not be written ({' '.join(str(error).split())})") from error
    del index
    info = {
        "format_version": FORMAT_VERSION,
        "teacher_name": teacher_name,
        "teacher_fingerprint": teacher_fingerprint,
        "dimension": vectors.shape[1],
        "metric": "inner_product",
        "kind": factory,
        "search_parameters": search_parameters,
        "num_documents": len(documents),
        "checksums": {
            path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
        },
    }
    (folder / "index.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def check_model(info: dict[str, Any], config: Any) -> None:
    """Raises `IndexMismatchError` unless a model with this `NativeRetrievalConfig` may search an index with this `info`."""
    check_teacher(
        info["teacher_fingerprint"], info["teacher_name"], config.teacher_fingerprint, config.teacher_name_or_path
    )
    if config.embedding_dim != info["dimension"]:
        raise IndexMismatchError(
            f"The model's embedding_dim is {config.embedding_dim}, wanted the index's {info['dimension']}; "
            "take the model that was trained towards this index's teacher."
        )


def check_teacher(index_fingerprint: str, index_teacher: str, model_fingerprint: str, model_teacher: str) -> None:
    """Raises `IndexMismatchError`, naming both teachers, if index and model learned from different ones."""
    if not (model_fingerprint and same_teacher(index_fingerprint, model_fingerprint)):
        raise IndexMismatchError(
            f"The index holds vectors of teacher {index_teacher!r} (fingerprint {index_fingerprint}), but the model "
            f"was trained towards {model_teacher!r} (fingerprint {model_fingerprint}), wanted the same; "
            "build the index with the model's teacher, or take a model of the index's teacher."
        )


def _mismatch(what: str, seen: object, wanted: object) -> NoReturn:
    raise IndexMismatchError(f"{what} is {seen}, wanted {wanted}; copy the whole directory again, or build it again.")


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / "index.json").exists():
        raise FileExistsError(f"{target} exists and is no index, wanted a new or empty directory; pass another one.")
    if not overwrite:
        raise FileExistsError(
            f"{target} already holds an index, wanted a new or empty directory; "
            "pass another one, or overwrite=True to replace it."
        )
    if others := sorted({path.name for path in target.iterdir()}.difference(PARTS)):
        raise FileExistsError(
            f"{target} holds {others[0]!r} beside an index, which overwrite=True would remove too; move it, or pass another directory."
        )


def check_query_vectors(vectors: np.ndarray, k: int, info: dict[str, Any]) -> np.ndarray:
    """The vectors as a float32 array; raises `ValueError` if they, or k, cannot be searched with in this index."""
    if k < 1:
        raise ValueError(f"k is {k}, wanted at least 1; ask for the number of documents that you want back.")
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != info["dimension"]:
        raise ValueError(
            f"Query vectors have shape {vectors.shape}, wanted (num_queries, {info['dimension']}); "
            f"encode the queries with a model of this index's teacher, {info['teacher_name']!r}."
        )
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        raise ValueError(
            f"Query vector {bad[0]} has norm {norms[bad[0]]}, wanted a finite one above 0; "
            "check that this query has text and that the model was trained."
        )
    return vectors


def check_documents(documents: datasets.Dataset, vectors: np.ndarray) -> None:
    """Raises `ValueError`, naming the document, unless these are documents with a unit vector each."""
    missing = [column for column in REQUIRED_COLUMNS if column not in documents.column_names]
    if missing:
        raise ValueError(
            f"Documents have the columns {documents.column_names}, wanted also {missing}; rename or add them."
        )
    if len(documents) == 0:
        raise ValueError("There are 0 documents, wanted at least 1; check the corpus file.")
    if vectors.ndim != 2 or len(vectors) != len(documents) or vectors.shape[1] == 0:
        raise ValueError(
            f"Document vectors have shape {vectors.shape}, wanted ({len(documents)}, dimension); "
            "pass one vector a document, in the documents' order."
        )
    ids = list(documents["_id"])
    seen: set[str] = set()
    for row, doc_id in enumerate(ids):
        if doc_id in seen:
            raise ValueError(
                f"Document id {doc_id!r} is used twice, the second time in row {row}, wanted once; "
                "drop the duplicate or give it an id of its own."
            )
        seen.add(doc_id)
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))  # np.linalg.norm would make two copies of them all
    bad = np.flatnonzero(~(np.abs(norms - 1.0) <= NORM_TOLERANCE))
    if bad.size:
        row = int(bad[0])
        raise ValueError(
            f"The vector of document {ids[row]!r} (row {row}) has norm {norms[row]}, wanted 1; "
            "L2-normalise the vectors, and check that this document has text."
        )
