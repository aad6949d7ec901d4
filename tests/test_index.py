"""The document index: round trip, exact search, and every way in which it refuses."""

import json
import resource
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import faiss
import numpy as np
import pytest
from filelock import FileLock

from native_retrieval import index as index_module
from native_retrieval.index import DocumentIndex, IndexMismatchError, check_teacher

NUM_DOCUMENTS, DIMENSION = 40, 8


def make_documents(num_documents: int = NUM_DOCUMENTS) -> datasets.Dataset:
    rows = range(num_documents)
    return datasets.Dataset.from_dict(
        {"_id": [f"doc{row}" for row in rows], "title": ["" for _ in rows], "text": [f"text {row}" for row in rows]}
    )


def make_vectors(num_vectors: int = NUM_DOCUMENTS, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num_vectors, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(output_dir: Path, **changes) -> DocumentIndex:
    arguments = {
        "documents": make_documents(),
        "vectors": make_vectors(),
        "teacher_fingerprint": "1234abcd",
        "teacher_name": "teacher-a",
        "output_dir": output_dir,
        **changes,
    }
    return DocumentIndex.build(**arguments)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build(tmp_path / "index")
    return tmp_path / "index"


def names_beside(directory: Path) -> list[str]:
    """What lies in its parent, but for the lock, which stays."""
    return [part.name for part in directory.parent.iterdir() if part.suffix != ".lock"]


def assert_one_line(error: pytest.ExceptionInfo) -> None:
    """A sentence for people, without lines of C++."""
    said = str(error.value)
    assert said and "\n" not in said
    assert not any(word in said for word in ("faiss::", ".cpp", "::", "Error in", "std"))


def content_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_round_trip(directory: Path):
    index = DocumentIndex.load(directory)
    assert len(index) == NUM_DOCUMENTS
    assert index.ids == make_documents()["_id"][:]
    assert index.documents[3] == make_documents()[3]
    assert index.info["teacher_name"] == "teacher-a"
    assert (index.info["dimension"], index.info["num_documents"]) == (DIMENSION, NUM_DOCUMENTS)
    assert index.info == json.loads((directory / "index.json").read_text())
    assert sorted(part.name for part in directory.iterdir()) == ["documents", "index.faiss", "index.json"]
    assert names_beside(directory) == ["index"], "nothing temporary is left"


def test_search_is_exact(directory: Path):
    queries = make_vectors(5, seed=1)
    similarities = queries @ make_vectors().T
    scores, rows = DocumentIndex.load(directory).search(queries, k=7)
    assert (scores.dtype, rows.dtype, scores.shape, rows.shape) == (np.float32, np.int64, (5, 7), (5, 7))
    np.testing.assert_array_equal(rows, np.argsort(-similarities, axis=1)[:, :7])
    np.testing.assert_allclose(scores, np.take_along_axis(similarities, rows, axis=1), rtol=1e-5, atol=1e-6)


def test_every_document_finds_itself_and_batching_changes_nothing(directory: Path):
    index, vectors = DocumentIndex.load(directory), make_vectors()
    scores, rows = index.search(vectors, k=1)
    np.testing.assert_array_equal(rows[:, 0], np.arange(NUM_DOCUMENTS))
    np.testing.assert_allclose(scores, 1.0, atol=1e-5)
    np.testing.assert_array_equal(np.vstack([index.search(vector[None], k=1)[1] for vector in vectors]), rows)


def test_k_is_clamped_and_no_queries_are_fine(directory: Path):
    index = DocumentIndex.load(directory)
    _, rows = index.search(make_vectors(2), k=10_000)
    assert [sorted(row) for row in rows.tolist()] == [list(range(NUM_DOCUMENTS))] * 2
    scores, rows = index.search(np.empty((0, DIMENSION), dtype=np.float32), k=3)
    assert scores.shape == rows.shape == (0, 3)


def test_selected_documents_keep_their_rows(tmp_path: Path):
    index = build(tmp_path / "index", documents=make_documents().select([7, 2, 30]), vectors=make_vectors(3))
    assert index.ids == ["doc7", "doc2", "doc30"]
    assert index.search(make_vectors(3), k=1)[1].ravel().tolist() == [0, 1, 2]


def test_half_precision_vectors_and_any_memory_order_pass(tmp_path: Path):
    vectors = np.asfortranarray(make_vectors().astype(np.float16))
    _, rows = build(tmp_path / "index", vectors=vectors).search(np.asfortranarray(make_vectors(4)), k=1)
    assert rows.ravel().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 3.0])
def test_bad_document_vector_names_the_document(tmp_path: Path, value: float):
    vectors = make_vectors()
    vectors[5] = value
    with pytest.raises(ValueError, match=r"'doc5' \(row 5\) has norm .*wanted 1") as error:
        build(tmp_path / "index", vectors=vectors)
    assert_one_line(error)
    assert not list(tmp_path.iterdir()), "nothing half-written is left"


@pytest.mark.parametrize("shape", [(NUM_DOCUMENTS - 1, DIMENSION), (NUM_DOCUMENTS,), (NUM_DOCUMENTS, 0)])
def test_document_vectors_of_the_wrong_shape(tmp_path: Path, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=rf"wanted \({NUM_DOCUMENTS}, dimension\)") as error:
        build(tmp_path / "index", vectors=np.ones(shape, dtype=np.float32))
    assert_one_line(error)


def test_bad_documents(tmp_path: Path):
    doubled = datasets.concatenate_datasets([make_documents(3), make_documents(1)])
    with pytest.raises(ValueError, match="'doc0' is used twice, the second time in row 3") as error:
        build(tmp_path / "index", documents=doubled, vectors=make_vectors(4))
    assert_one_line(error)
    with pytest.raises(ValueError, match=r"wanted also \['title'\]"):
        build(tmp_path / "index", documents=make_documents().remove_columns("title"))
    with pytest.raises(ValueError, match="0 documents"):
        build(tmp_path / "index", documents=make_documents(0), vectors=make_vectors(0))


def test_missing_parts(directory: Path):
    (directory / "index.faiss").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no index\.faiss, wanted"):
        DocumentIndex.load(directory)
    (directory / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no index\.json, wanted") as error:
        DocumentIndex.load(directory)
    assert_one_line(error)


def test_truncated_faiss_file(directory: Path):
    file = directory / "index.faiss"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(IndexMismatchError, match=r"index\.faiss: truncated or changed.*build it again") as error:
        DocumentIndex.load(directory)
    assert_one_line(error)


@pytest.mark.parametrize(("key", "value"), [("format_version", 99), ("num_documents", 41)])
def test_index_json_that_does_not_fit(directory: Path, key: str, value: int):
    info = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(info | {key: value}))
    with pytest.raises(IndexMismatchError, match=f"{value}") as error:
        DocumentIndex.load(directory)
    assert_one_line(error)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_bad_query_vector_names_the_row(directory: Path, value: float):
    queries = make_vectors(4)
    queries[2] = value
    with pytest.raises(ValueError, match="Query vector 2 has norm") as error:
        DocumentIndex.load(directory).search(queries, k=1)
    assert_one_line(error)


@pytest.mark.parametrize("shape", [(2, DIMENSION + 1), (DIMENSION,)])
def test_query_vectors_of_the_wrong_shape(directory: Path, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=rf"wanted \(num_queries, {DIMENSION}\).*'teacher-a'") as error:
        DocumentIndex.load(directory).search(np.ones(shape, dtype=np.float32), k=1)
    assert_one_line(error)


def test_k_below_one(directory: Path):
    for k in (0, -1, 2.5, "3", None):
        with pytest.raises(ValueError, match=f"k is {k!r}, wanted at least 1"):
            DocumentIndex.load(directory).search(make_vectors(1), k=k)


def test_overwriting(directory: Path):
    with pytest.raises(FileExistsError, match="overwrite=True") as error:
        build(directory)
    assert_one_line(error)
    (directory / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        build(directory, documents=make_documents(3), vectors=make_vectors(3), overwrite=True)
    (directory / "notes.txt").unlink()
    build(directory, documents=make_documents(3), vectors=make_vectors(3), overwrite=True)
    assert len(DocumentIndex.load(directory)) == 3
    assert names_beside(directory) == ["index"]


def test_a_directory_that_is_no_index_is_never_replaced(tmp_path: Path):
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="is no index"):
        build(tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").read_text() == "keep me"


def test_an_empty_directory_is_filled(tmp_path: Path):
    (tmp_path / "index").mkdir()
    assert len(build(tmp_path / "index")) == NUM_DOCUMENTS


def test_a_build_that_fails_leaves_the_old_index(directory: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path) -> str:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(index_module, "sha256", fail)
        with pytest.raises(OSError, match="disk full"):
            build(directory, documents=make_documents(3), vectors=make_vectors(3), overwrite=True)
    assert len(DocumentIndex.load(directory)) == NUM_DOCUMENTS
    assert names_beside(directory) == ["index"]


BAD_KINDS = {
    "unknown": (("Flt", ""), "'Flt'"),
    "empty": (("", ""), "''"),
    "one string": ("Flat", "factory string and search parameters"),
    "no pair": (("Flat",), "factory string and search parameters"),
    "no strings": (("Flat", {"nprobe": 4}), "factory string and search parameters"),
    "binary": (("BFlat", ""), "'BFlat'"),
    "binary IVF": (("BIVF4", ""), "'BIVF4'"),
    "ids of its own": (("IDMap,Flat", ""), "'IDMap,Flat'"),
    "ids of its own, as a suffix": (("Flat,IDMap", ""), "'Flat,IDMap'"),
    "too few documents for the lists": (("IVF64,Flat", ""), "at least 64 vectors"),
    "too few documents for the codes": (("PQ4", ""), "at least 256 vectors"),
    "too few documents for both": (("IVF4,PQ4", ""), "at least 256 vectors"),
    "too few documents for a graph": (("NSG16", ""), "'NSG16'"),
    "codes that do not divide the dimension": (("PQ3x4", ""), "'PQ3x4'"),
    "more dimensions than there are": (("PCA64,Flat", ""), "'PCA64,Flat'"),
    "L2 only": (("LSH", ""), "'LSH'"),
    "cannot be loaded again": (("ZnLattice1x2_4", ""), "'ZnLattice1x2_4'"),
    "ends the process": (("HNSW0", ""), "'HNSW0'"),
    "ends the process too": (("HNSW1,Flat", ""), "'HNSW1,Flat'"),
    "keeps nothing of a vector": (("PCA0,Flat", ""), "'PCA0,Flat'"),
    "mistyped parameter": (("HNSW32", "efSerch=64"), "'efSerch=64'"),
    "mistyped parameter among others": (("HNSW32", "efSearch=64,efSerch=3"), "'efSerch=3'"),
    "parameter of another kind": (("HNSW32", "nprobe=4"), "'nprobe=4'"),
    "parameter of an exact index": (("Flat", "nprobe=4"), "'nprobe=4'"),
    "parameter without a value": (("HNSW32", "efSearch"), "'efSearch'"),
    "parameter with another sign": (("HNSW32", "efSearch:64"), "'efSearch:64'"),
    "parameter that is no number": (("HNSW32", "efSearch=many"), "'efSearch=many'"),
    "parameter of 0": (("IVF4,Flat", "nprobe=0"), "'nprobe=0'"),
    "parameter below 0": (("HNSW32", "efSearch=-1"), "'efSearch=-1'"),
    "parameter of nan": (("HNSW32", "efSearch=nan"), "'efSearch=nan'"),
}


@pytest.mark.parametrize(("kind", "said"), BAD_KINDS.values(), ids=BAD_KINDS)
def test_a_kind_that_faiss_refuses_is_one_line_and_leaves_the_old_index(directory: Path, kind, said: str):
    before = content_of(directory)
    with pytest.raises(ValueError) as error:
        build(directory, kind=kind, overwrite=True)
    assert_one_line(error)
    assert said in str(error.value)
    assert content_of(directory) == before and names_beside(directory) == ["index"]
    with pytest.raises(ValueError):
        build(directory.parent / "new", kind=kind)
    assert names_beside(directory) == ["index"], "nothing half-written is left"


@pytest.mark.parametrize("step", ["save", "write", "load", "search", "rename", "last load"])
def test_any_failure_leaves_the_old_index(directory: Path, step: str, monkeypatch: pytest.MonkeyPatch):
    before, calls = content_of(directory), []

    def failing(function, at: int = 1):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise OSError("the disk is gone")
            return function(*args, **kwargs)

        return call

    target, name, at = {
        "save": (datasets.Dataset, "save_to_disk", 1),
        "write": (faiss, "write_index", 1),
        "load": (faiss, "read_index", 1),
        "search": (DocumentIndex, "search", 1),
        "rename": (index_module.os, "replace", 2),
        "last load": (faiss, "read_index", 2),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, failing(getattr(target, name), at))
        with pytest.raises(OSError, match="the disk is gone"):
            build(directory, documents=make_documents(3), vectors=make_vectors(3), overwrite=True)
    assert len(calls) >= at and content_of(directory) == before and names_beside(directory) == ["index"]
    assert len(DocumentIndex.load(directory)) == NUM_DOCUMENTS


@pytest.mark.parametrize(
    "kind",
    [("HNSW32", "efSearch=64"), ("IVF4,Flat", "nprobe=4"), ("SQ8", ""), ("L2norm,Flat", ""), ("PQ4x4", "")]
    + [("IVF4,Flat,RFlat", "nprobe=4,k_factor_rf=2"), ("IVF4_HNSW32,Flat", "nprobe=4, quantizer_efSearch=8")]
    + [("HNSW32_PQ4x4", ""), ("HNSW16,PQ4x4", "efSearch=64")],  # these two know squared distances only
    ids=lambda kind: kind[0],
)
def test_scores_are_cosines_and_fall_whatever_the_kind(tmp_path: Path, kind: tuple[str, str]):
    vectors, queries = make_vectors(400), make_vectors(20, seed=1)
    index = build(tmp_path / "index", documents=make_documents(400), vectors=vectors, kind=kind)
    for built in (index, DocumentIndex.load(tmp_path / "index")):
        scores, rows = built.search(queries, 5)
        assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
        assert (np.diff(scores, axis=1) <= 1e-6).all()
        exact = np.take_along_axis(queries @ vectors.T, rows, axis=1)
        assert np.abs(scores - exact).mean() < 0.08 and exact.mean() > 0.5


def test_what_an_approximate_index_does_not_find_is_marked(tmp_path: Path):
    index = build(tmp_path / "index", kind=("IVF8,Flat", "nprobe=1"))
    scores, rows = index.search(make_vectors(5, seed=1), NUM_DOCUMENTS)
    assert (rows == -1).any() and np.isneginf(scores[rows == -1]).all() and np.isfinite(scores[rows >= 0]).all()


def test_other_teacher_is_refused_naming_both(directory: Path):
    index = DocumentIndex.load(directory)
    fingerprint = index.info["teacher_fingerprint"]
    model = {"teacher_fingerprint": fingerprint, "teacher_name_or_path": "teacher-a", "embedding_dim": DIMENSION}
    index.check_model(SimpleNamespace(**model))
    with pytest.raises(IndexMismatchError, match=rf"embedding_dim is 9, wanted the index's {DIMENSION}") as error:
        index.check_model(SimpleNamespace(**model | {"embedding_dim": 9}))
    assert_one_line(error)


def test_check_teacher(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_module, "same_teacher", lambda a, b: a == b)
    check_teacher("aa", "teacher-a", "aa", "a/mirror/of/teacher-a")
    with pytest.raises(IndexMismatchError, match="'teacher-a'.*'teacher-b'") as error:
        check_teacher("aa", "teacher-a", "bb", "teacher-b")
    assert_one_line(error)


def test_a_large_index_is_a_graph_and_finds_almost_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("native_retrieval.index.EXACT_UP_TO", 100)
    documents, vectors, queries = make_documents(2000), make_vectors(2000), make_vectors(50, seed=1)
    exact = build(tmp_path / "exact", documents=documents, vectors=vectors, kind=("Flat", ""))
    graph = build(tmp_path / "graph", documents=documents, vectors=vectors)
    assert (exact.info["kind"], graph.info["kind"]) == ("Flat", "HNSW32,SQfp16")
    assert faiss.downcast_index(graph.vectors).hnsw.efSearch == 128
    wanted, found = exact.search(queries, 10)[1], graph.search(queries, 10)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(wanted, found, strict=True)]) > 0.95


def test_an_index_of_an_earlier_format_says_to_build_again(directory: Path):
    info = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(info | {"format_version": 1}))
    with pytest.raises(IndexMismatchError, match="format_version is 1, wanted 3; build it again"):
        DocumentIndex.load(directory)


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["index.faiss", "documents/data-00000-of-00001.arrow", "documents/state.json"])
def test_a_part_that_was_edited_is_named(directory: Path, part: str):
    content = bytearray((directory / part).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / part).write_bytes(content)
    with pytest.raises(IndexMismatchError, match=rf"{part}: truncated or changed.*build it again") as error:
        DocumentIndex.load(directory)
    assert_one_line(error)


def test_other_documents_are_refused_though_they_are_as_many(directory: Path, tmp_path: Path):
    build(tmp_path / "other", documents=make_documents().map(lambda row: {"text": row["text"].replace("1", "2")}))
    for path in (tmp_path / "other" / "documents").iterdir():
        path.replace(directory / "documents" / path.name)
    with pytest.raises(IndexMismatchError, match="documents/.*changed"):
        DocumentIndex.load(directory)


def test_a_part_that_is_gone_is_named(directory: Path):
    (directory / "documents" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(IndexMismatchError, match=r"arrow is missing") as error:
        DocumentIndex.load(directory)
    assert_one_line(error)


def test_what_a_user_adds_is_no_damage(directory: Path):
    mapped = DocumentIndex.load(directory).documents.map(lambda row: {"length": len(row["text"])})  # keeps a file there
    assert mapped["length"][0] == 6 and len(DocumentIndex.load(directory)) == NUM_DOCUMENTS


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"format_version": 3}'])
def test_index_json_that_cannot_be_read(directory: Path, content: str):
    (directory / "index.json").write_text(content)
    with pytest.raises(IndexMismatchError, match=r"index\.json is not readable") as error:
        DocumentIndex.load(directory)
    assert_one_line(error)


def replace_faiss(directory: Path, index, **info) -> None:
    """Puts another FAISS index into the directory, with the checksum that it needs."""
    write = faiss.write_index_binary if isinstance(index, faiss.IndexBinary) else faiss.write_index
    write(index, str(directory / "index.faiss"))
    told = json.loads((directory / "index.json").read_text())
    told["checksums"]["index.faiss"] = index_module.sha256(directory / "index.faiss")
    (directory / "index.json").write_text(json.dumps(told | info))


def other_index(name: str):
    if name == "binary":
        index = faiss.IndexBinaryFlat(DIMENSION)
        index.add(np.zeros((NUM_DOCUMENTS, 1), dtype=np.uint8))
        return index
    dimension = DIMENSION + (name == "wider")
    index = faiss.IndexFlat(dimension, faiss.METRIC_L1 if name == "another metric" else faiss.METRIC_INNER_PRODUCT)
    index.add(np.ones((NUM_DOCUMENTS + (name == "longer"), dimension), dtype=np.float32))
    return index


@pytest.mark.parametrize("name", ["binary", "wider", "longer", "another metric"])
def test_a_faiss_index_of_another_kind_is_refused(directory: Path, name: str):
    replace_faiss(directory, other_index(name))
    with pytest.raises(IndexMismatchError, match="build it again") as error:
        DocumentIndex.load(directory)
    assert_one_line(error)
    fitting = build(directory.parent / "fitting")
    with pytest.raises(IndexMismatchError) as error:
        DocumentIndex(fitting.documents, other_index(name), fitting.info)
    assert_one_line(error)


@pytest.mark.parametrize("parameters", ["efSerch=64", "nprobe=0", "nonsense"])
def test_search_parameters_that_do_not_fit_are_refused_when_loading(directory: Path, parameters: str):
    told = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(told | {"search_parameters": parameters}))
    with pytest.raises(IndexMismatchError, match=parameters) as error:
        DocumentIndex.load(directory)
    assert_one_line(error)


def test_squared_distances_become_cosines(directory: Path):
    index = faiss.IndexFlatL2(DIMENSION)
    index.add(make_vectors())
    queries = 3 * make_vectors(5, seed=1)  # of any length
    wanted = DocumentIndex.load(directory).search(queries, 7)
    replace_faiss(directory, index)
    scores, rows = DocumentIndex.load(directory).search(queries, 7)
    np.testing.assert_array_equal(rows, wanted[1])
    np.testing.assert_allclose(scores, wanted[0], atol=1e-5)


def test_faiss_reads_nothing_that_has_no_checksum(directory: Path, monkeypatch: pytest.MonkeyPatch):
    info = json.loads((directory / "index.json").read_text())
    del info["checksums"]["index.faiss"]
    (directory / "index.json").write_text(json.dumps(info))
    monkeypatch.setattr("faiss.read_index", None)
    with pytest.raises(IndexMismatchError, match=r"index\.faiss"):
        DocumentIndex.load(directory)


def test_what_a_killed_build_left_is_put_back_or_cleared(directory: Path):
    # Killed between the two renames: the old one is aside, and the new one not yet in its place.
    aside = directory.parent / ".index.building"
    aside.mkdir()
    directory.rename(aside / "old")
    (aside / "new").mkdir()
    with pytest.raises(FileExistsError, match="already holds an index"):
        build(directory)
    assert len(DocumentIndex.load(directory)) == NUM_DOCUMENTS
    assert names_beside(directory) == ["index"]


def test_a_second_build_waits_for_the_first(tmp_path: Path):
    with FileLock(tmp_path / ".index.lock"):
        second = threading.Thread(target=build, args=(tmp_path / "index",))
        second.start()
        second.join(0.3)
        assert second.is_alive() and names_beside(tmp_path / "index") == []
    second.join(30)
    assert len(DocumentIndex.load(tmp_path / "index")) == NUM_DOCUMENTS


@pytest.mark.parametrize(("rows", "width"), [(9000, 8), (40, 5000)], ids=["documents", "vectors"])
def test_a_full_disk_is_one_line_and_leaves_the_old_index(directory: Path, rows: int, width: int):
    vectors = np.zeros((rows, width), dtype=np.float32)
    vectors[:, 0] = 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # what is written beyond fails, as on a full disk
    try:
        with pytest.raises(OSError) as error:
            build(directory, documents=make_documents(rows), vectors=vectors, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_line(error)
    assert len(DocumentIndex.load(directory)) == NUM_DOCUMENTS
    assert names_beside(directory) == ["index"]
