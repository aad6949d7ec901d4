"""The teacher's document index: documents, FAISS file and `index.json`, in one directory.

`index.json` names the teacher of the vectors: a model that was trained towards another teacher gets an error, not noise.
The FAISS file is memory-mapped, so that opening a large index costs no more than its checksum.
"""

import json
import os
import re
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
EXACT_UP_TO = 100_000  # vectors: scanning these takes some milliseconds; `benchmarks/index.py` has the figures
APPROXIMATE = ("HNSW32,SQfp16", "efSearch=128")
ADVICE = "leave kind out, or give another one, such as ('Flat', '') or ('HNSW32,SQfp16', 'efSearch=128')"
PARTS = ("index.json", "index.faiss", "documents")
FIELDS = {"teacher_name", "teacher_fingerprint", "dimension", "num_documents", "search_parameters", "checksums"}
REQUIRED_COLUMNS = ("_id", "title", "text")
NORM_TOLERANCE = 1e-2  # lets half-precision vectors pass


def label(document: Mapping[str, str]) -> str:
    """How a document is shown to people: its title, or the beginning of its text."""
    text = " ".join(document["text"].split())
    return document["title"].strip() or (text if len(text) <= 60 else f"{text[:59]}…")


class IndexMismatchError(ValueError):
    """An index does not fit the model, or its files do not fit each other."""


def default_kind(num_documents: int) -> tuple[str, str]:
    """FAISS's factory string and search parameters: exact while that is fast, else a graph of half-precision vectors."""
    return ("Flat", "") if num_documents <= EXACT_UP_TO else APPROXIMATE


class DocumentIndex:
    """Documents and their vectors, searched by inner product (cosine, as the vectors have length 1).

    Make one with `DocumentIndex.build` or `DocumentIndex.load`.

    Attributes:
        documents: columns `_id`, `title`, `text`, memory-mapped; row i has vector i.
        vectors: the FAISS index.
        info: the content of `index.json`: `format_version`, `teacher_name`, `teacher_fingerprint`, `dimension`, `metric`,
            `kind` and `search_parameters` (FAISS's), `num_documents`, and the sha256 of every other file, `checksums`.
    """

    def __init__(self, documents: datasets.Dataset, vectors: faiss.Index, info: dict[str, Any]) -> None:
        if not isinstance(vectors, faiss.Index):
            _mismatch("The FAISS index", f"a {type(vectors).__name__}", "one of float vectors")
        if vectors.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
            _mismatch("The FAISS index's metric", vectors.metric_type, "inner product or L2")
        seen = (vectors.d, vectors.ntotal, len(documents))
        if seen != (wanted := (info["dimension"], info["num_documents"], info["num_documents"])):
            _mismatch("The index's size (dimension, vectors, documents)", seen, wanted)
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
        """
        Writes an index and loads it.

        The new index is written, loaded and searched in a folder beside `output_dir`, and takes its name after that. If
        anything fails, an index that was there stays as it is. A second process waits.

        Args:
            documents: columns `_id` (unique), `title`, `text`.
            vectors: `(num_documents, dimension)`, float32, L2-normalised, row i for document i.
            teacher_fingerprint: which vectors these are, see `teacher.py`.
            teacher_name: the teacher's name, for people.
            output_dir: the index directory.
            kind: FAISS's factory string and search parameters, such as `("HNSW32,SQfp16", "efSearch=128")`; by default
                what `default_kind` takes for so many documents.
            overwrite: replace the index in `output_dir`.

        Raises:
            ValueError: documents or vectors that do not fit (the message names the document), or a `kind` that FAISS
                cannot build, load or search.
            FileExistsError: `output_dir` is not empty, and `overwrite` is off or it holds more than an index.
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
                return cls.load(target)
            except BaseException:
                if replaced.exists():
                    shutil.rmtree(target, ignore_errors=True)
                    os.replace(replaced, target)
                raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)

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
            whole = version != FORMAT_VERSION or (info.keys() >= FIELDS and isinstance(info["checksums"], dict))
        except (ValueError, TypeError, KeyError):  # not JSON, or not an object of these fields
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
        try:
            vectors = faiss.read_index(str(path / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise IndexMismatchError(
                f"{path}/index.faiss is no index of float vectors that this FAISS reads{_reason(error)}; build it again."
            ) from error
        try:
            _set_search_parameters(vectors, info["search_parameters"])
        except ValueError as error:
            raise IndexMismatchError(f"{path}/index.json: {error}") from error
        return cls(datasets.load_from_disk(path / "documents"), vectors, info)

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest documents of every query.

        Args:
            vectors: `(num_queries, dimension)`, L2-normalised for cosine scores.
            k: documents a query; more than the index holds gives all of them.

        Returns:
            `scores` (cosine similarities), float32, descending, and `rows` of `documents`, int64, both
            `(num_queries, min(k, len(self)))`. An approximate index may find fewer: the rest has row -1, score -inf.

        Raises:
            ValueError: k below 1, another shape, or a vector that is zero or not finite.
        """
        vectors = check_query_vectors(vectors, k, self.info)
        k = min(k, len(self))
        if len(vectors) == 0:
            return np.empty((0, k), dtype=np.float32), np.empty((0, k), dtype=np.int64)
        scores, rows = self.vectors.search(vectors, k)
        if self.vectors.metric_type == faiss.METRIC_L2:  # squared distances: some kinds know no other metric
            scores = (np.square(vectors).sum(1, keepdims=True) + 1 - scores) / 2
        return np.where(rows < 0, np.float32(-np.inf), scores), rows

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
    """Writes the files of an index, loads them and searches."""
    kind = default_kind(len(documents)) if kind is None else kind
    if isinstance(kind, str) or len(kind) != 2 or not all(isinstance(part, str) for part in kind):
        raise ValueError(f"kind is {kind!r}, wanted FAISS's factory string and search parameters; {ADVICE}.")
    factory, search_parameters = kind
    index = _build_faiss(vectors, factory, search_parameters)
    documents.save_to_disk(folder / "documents")
    try:
        faiss.write_index(index, str(folder / "index.faiss"))
    except RuntimeError as error:  # a full disk, among others
        raise OSError(f"{folder}/index.faiss could not be written{_reason(error)}; free some space.") from error
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
    try:
        scores, rows = DocumentIndex.load(folder).search(vectors[:3], 1)
    except (RuntimeError, IndexMismatchError) as error:
        raise _refused(factory, vectors, _reason(error.__cause__ or error)) from error
    if (rows < 0).any() or not np.isfinite(scores).all():
        raise _refused(factory, vectors, " that finds its own vectors")


def _build_faiss(vectors: np.ndarray, factory: str, search_parameters: str) -> faiss.Index:
    if re.search(r"(?<!\d)0+(?!\d)|(HNSW|NSG)1(?!\d)", factory):  # FAISS would end the whole process
        raise ValueError(f"FAISS's factory string {factory!r} holds a size that is too small; {ADVICE}.")
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        _set_search_parameters(index, search_parameters)  # a mistake shows before the training
        if "HNSW" in factory and "IVF" not in factory:  # with FAISS's default of 40, no search reaches a few vectors
            faiss.ParameterSpace().set_index_parameter(index, "efConstruction", 80)
        if not index.is_trained:
            index.train(vectors)
        index.add(vectors)
    except (RuntimeError, MemoryError) as error:
        raise _refused(factory, vectors, _reason(error)) from error
    return index


def _refused(factory: str, vectors: np.ndarray, reason: str) -> ValueError:
    count, dimension = vectors.shape
    return ValueError(
        f"FAISS makes no index of kind {factory!r} from {count} vectors of {dimension} dimensions{reason}; {ADVICE}."
    )


def _set_search_parameters(index: faiss.Index, parameters: str) -> None:
    """Sets FAISS's search parameters, such as `"nprobe=8"`; raises `ValueError` for one that the index does not have."""
    for parameter in filter(None, parameters.split(",")):
        name, _, value = parameter.partition("=")
        try:
            if not 1 <= float(value) < 1 << 31:  # with efSearch=0, FAISS finds a single document
                raise ValueError
            faiss.ParameterSpace().set_index_parameter(index, name.strip(), float(value))
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"FAISS's search parameter {parameter.strip()!r} does not fit the index, of type "
                f"{type(faiss.downcast_index(index)).__name__}; give name=value with a number of at least 1, such as "
                "'efSearch=128' for HNSW or 'nprobe=8' for IVF."
            ) from error


def _reason(error: BaseException) -> str:
    """FAISS's words in brackets, without its C++."""
    text = " ".join(str(error).split())
    if too_few := re.search(r"training points \(\d+\).* clusters \((\d+)\)", text):
        return f" (its training needs at least {too_few[1]} vectors)"
    text = re.sub(r"^.*\.(cpp|h):\d+: (Error: '.*' failed:? ?)?", "", text)
    return f" ({text})" if text and "::" not in text else ""


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
    """Raises `IndexMismatchError`, naming both teachers, if those of index and model differ."""
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
            f"{target} holds {others[0]!r} beside an index, which overwrite=True would remove too; "
            "move it, or pass another directory."
        )


def check_query_vectors(vectors: np.ndarray, k: int, info: dict[str, Any]) -> np.ndarray:
    """The vectors as a float32 array; raises `ValueError` if they, or k, cannot be searched with in this index."""
    if not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k is {k!r}, wanted at least 1; ask for the number of documents that you want back.")
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
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))  # np.linalg.norm would copy them all, twice
    bad = np.flatnonzero(~(np.abs(norms - 1.0) <= NORM_TOLERANCE))
    if bad.size:
        row = int(bad[0])
        raise ValueError(
            f"The vector of document {ids[row]!r} (row {row}) has norm {norms[row]}, wanted 1; "
            "L2-normalise the vectors, and check that this document has text."
        )
