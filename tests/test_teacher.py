import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import StubTeacher
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from native_retrieval import teacher as teacher_module
from native_retrieval.teacher import FINGERPRINT_SENTENCES, Teacher, document_texts, same_teacher, search

REAL_TEACHER = os.environ.get("NATIVE_RETRIEVAL_TEACHER")

TEXTS = ["the bridge", "who built the old lighthouse by the sea", "coins", "maps and tools of the harbour"]
CORPUS = Dataset.from_dict({"title": ["Tea", "", "Water"], "text": ["A drink.", "Another drink.", ""]})


class FakeSentenceTransformer:
    """What is used of `sentence_transformers.SentenceTransformer`; `encoded` keeps every text that went through."""

    encoded: list[str] = []
    max_seq_length = 64
    prompts: dict[str, str] = {}
    tokenizer = None
    device = torch.device("cpu")

    def __init__(self, name_or_path: str, revision: str | None = None, **kwargs):
        self.name_or_path, self.revision = name_or_path, revision
        self.width = int(name_or_path.partition("width-")[2] or 48)

    def get_embedding_dimension(self) -> int:
        return self.width

    def to(self, dtype: torch.dtype) -> "FakeSentenceTransformer":
        return self

    def encode(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        FakeSentenceTransformer.encoded += [text for text in texts if text not in FINGERPRINT_SENTENCES]
        vectors = []
        for text in texts:
            seed = hashlib.sha256(f"{self.name_or_path.split('#')[0]}: {prompt}: {text}".encode()).digest()
            vectors.append(np.random.default_rng(list(seed)).standard_normal(self.width))
            if "zero" in text:
                vectors[-1][:] = 0
            if "nan" in text:
                vectors[-1][:] = np.nan
        vectors = np.array(vectors)
        if "#" in self.name_or_path:  # the same model on another device
            vectors += 0.001 * np.random.default_rng(0).standard_normal(vectors.shape)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(norms == 0, 1, norms)).astype(np.float32)

    def encode_query(self, texts: Sequence[str], *, normalize_embeddings: bool, **kwargs) -> np.ndarray:
        assert normalize_embeddings
        return self.encode(texts, "query")

    def encode_document(self, texts: Sequence[str], *, normalize_embeddings: bool, **kwargs) -> np.ndarray:
        assert normalize_embeddings
        return self.encode(texts, "document")


@pytest.fixture(autouse=True)
def fake_sentence_transformers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_teacher" in request.fixturenames:
        return
    fake = ModuleType("sentence_transformers")
    fake.SentenceTransformer = FakeSentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    monkeypatch.setattr(teacher_module, "SentenceTransformer", FakeSentenceTransformer, raising=False)
    monkeypatch.setattr(FakeSentenceTransformer, "encoded", [])


def flip(fingerprint: str, bits: int) -> str:
    number = int(fingerprint, 16)
    for bit in range(bits):
        number ^= 1 << (20 * bit % 256)
    return f"{number:0{len(fingerprint)}x}"


# Fingerprints


@given(st.binary(min_size=32, max_size=32), st.integers(0, 12))
def test_a_few_bits_of_rounding_are_the_same_teacher(raw: bytes, bits: int):
    assert same_teacher(raw.hex(), raw.hex())
    assert same_teacher(raw.hex(), flip(raw.hex(), bits))
    assert same_teacher(flip(raw.hex(), bits), raw.hex())


def test_more_bits_are_another_teacher():
    mine = StubTeacher().fingerprint
    assert not same_teacher(mine, flip(mine, 13))
    assert not same_teacher(mine, hashlib.sha256(b"another").hexdigest())
    assert not same_teacher(mine, mine[:-2])


def test_fingerprints():
    mine = Teacher("mine").fingerprint
    assert len(mine) == 64 and int(mine, 16) >= 0
    assert Teacher("mine").fingerprint == mine
    assert same_teacher(Teacher("mine#half").fingerprint, mine)
    assert not same_teacher(Teacher("other").fingerprint, mine)
    # A teacher is recognised by its vectors, not by where it lies.
    assert Teacher("mine", cache_dir="anywhere", batch_size=3).fingerprint == mine


def test_a_teacher_that_is_too_narrow_for_a_fingerprint():
    with pytest.raises(ValueError, match="16 dimensions") as error:
        _ = Teacher("width-16").fingerprint
    assert "\n" not in str(error.value)
    assert len(Teacher("width-32").fingerprint) == 64


# Vectors


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_vectors_come_in_the_order_of_the_texts(batch_size: int):
    teacher = Teacher("mine", batch_size=batch_size)
    texts = [f"{text} {i}" for i in range(20) for text in TEXTS]
    vectors = teacher.encode(texts)
    assert vectors.shape == (80, 48) and vectors.dtype == np.float32 and teacher.dimension == 48
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for i in (0, 1, 41, 79):
        np.testing.assert_array_equal(vectors[i], teacher.encode([texts[i]])[0])


def test_queries_and_documents_have_prompts_of_their_own():
    teacher = Teacher("mine")
    assert not np.allclose(teacher.encode(TEXTS, "query"), teacher.encode(TEXTS, "document"))
    np.testing.assert_array_equal(teacher.encode(TEXTS), teacher.encode(TEXTS, kind="query"))


def test_a_query_is_counted_with_its_prompt(tiny_tokenizer, monkeypatch: pytest.MonkeyPatch):
    """It takes room in what the teacher reads, so as much less of a conversation fits."""
    teacher = Teacher("mine")
    monkeypatch.setattr(teacher.model, "tokenizer", tiny_tokenizer)
    for prompts in ({}, {"query": None}, {"query": "Find the bridge: "}):
        monkeypatch.setattr(teacher.model, "prompts", prompts, raising=False)
        whole = (prompts.get("query") or "") + TEXTS[1]
        assert teacher.count_tokens(TEXTS[1]) == len(tiny_tokenizer(whole)["input_ids"])


@pytest.mark.parametrize("text", ["zero", "nan"])
def test_a_bad_vector_names_the_text(text: str, tmp_path: Path):
    teacher = Teacher("mine", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="'mine'.*text 2") as error:
        teacher.cached([*TEXTS[:2], text], "query", "Vectors")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.npy"))


def test_a_bad_vector_names_the_text_whatever_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teacher_module, "SHARD_ROWS", 3)
    with pytest.raises(ValueError, match="'mine'.*text 4 "):
        Teacher("mine", cache_dir=tmp_path).cached([*TEXTS, "zero"], "query", "Vectors")


def test_no_texts_give_no_vectors():
    assert Teacher("mine").encode([]).shape == (0, 48)


def test_documents_are_their_title_and_text():
    assert document_texts(CORPUS) == ["Tea A drink.", "Another drink.", "Water"]
    teacher = Teacher("mine")
    np.testing.assert_array_equal(teacher.documents(CORPUS), teacher.encode(document_texts(CORPUS), "document"))


# The cache


def test_vectors_are_computed_once(tmp_path: Path):
    first = Teacher("mine", cache_dir=tmp_path).cached(TEXTS, "query", "Vectors")
    assert sorted(FakeSentenceTransformer.encoded) == sorted(TEXTS)
    second = Teacher("mine", cache_dir=tmp_path).cached(TEXTS, "query", "Vectors")
    assert len(FakeSentenceTransformer.encoded) == len(TEXTS)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, Teacher("mine").encode(TEXTS))


def test_documents_are_computed_once(tmp_path: Path):
    for _ in range(2):
        Teacher("mine", cache_dir=tmp_path).documents(CORPUS)
    assert len(FakeSentenceTransformer.encoded) == len(CORPUS)


def test_other_texts_kinds_and_teachers_are_computed_anew(tmp_path: Path):
    variants: list[Callable[[], np.ndarray]] = [
        lambda: Teacher("mine", cache_dir=tmp_path).cached(TEXTS, "query", "Vectors"),
        lambda: Teacher("mine", cache_dir=tmp_path).cached(TEXTS, "document", "Vectors"),
        lambda: Teacher("mine", cache_dir=tmp_path).cached(TEXTS[::-1], "query", "Vectors"),
        lambda: Teacher("mine", cache_dir=tmp_path).cached(TEXTS[:3], "query", "Vectors"),
        lambda: Teacher("mine", cache_dir=tmp_path).cached(["".join(TEXTS)], "query", "Vectors"),
        lambda: Teacher("other", cache_dir=tmp_path).cached(TEXTS, "query", "Vectors"),
    ]
    arrays = [compute() for compute in variants]
    assert len(list(tmp_path.glob("*.npy"))) == len(variants)
    for array, compute in zip(arrays, variants, strict=True):
        np.testing.assert_array_equal(compute(), array)


def test_without_a_cache_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        Teacher("mine").cached(TEXTS, "query", "Vectors")
    assert len(FakeSentenceTransformer.encoded) == 2 * len(TEXTS)
    assert not list(tmp_path.iterdir())


DAMAGE = {
    "empty": lambda content: b"",
    "cut in the magic": lambda content: content[:4],
    "cut in the header": lambda content: content[:60],
    "cut behind the header": lambda content: content[:128],
    "cut in the middle": lambda content: content[: len(content) // 2],
    "the last byte missing": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "a web page": lambda content: b"<!DOCTYPE html>\n" * 20,
    "one bit flipped": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_computed_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
):
    wanted = np.array(Teacher("mine", cache_dir=tmp_path).cached(TEXTS, "query", "Vectors"))
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(damage(path.read_bytes()))
    capsys.readouterr()
    np.testing.assert_array_equal(Teacher("mine", cache_dir=tmp_path).cached(TEXTS, "query", "Vectors"), wanted)
    assert len(FakeSentenceTransformer.encoded) == 2 * len(TEXTS)
    said = [line for line in capsys.readouterr().err.splitlines() if str(path) in line]
    assert len(said) == 1 and "computed again" in said[0]
    # And it is whole again.
    np.testing.assert_array_equal(Teacher("mine", cache_dir=tmp_path).cached(TEXTS, "query", "Vectors"), wanted)
    assert len(FakeSentenceTransformer.encoded) == 2 * len(TEXTS)


# Rankings


@pytest.fixture
def vectors() -> tuple[np.ndarray, np.ndarray]:
    made = np.random.default_rng(0).standard_normal((1500 + 200, 48)).astype(np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made[:1500], made[1500:]


@pytest.mark.parametrize("cached", [True, False])
def test_a_ranking_is_numpys(vectors: tuple[np.ndarray, np.ndarray], tmp_path: Path, cached: bool):
    targets, documents = vectors
    teacher = Teacher("mine", cache_dir=tmp_path if cached else None)
    ranking = teacher.ranking(targets, documents, k=20)
    assert ranking.shape == (1500, 20) and ranking.dtype == np.int32
    scores = targets @ documents.T
    wanted = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    # Two documents whose scores differ in the last bit may change places.
    np.testing.assert_allclose(np.take_along_axis(scores, ranking, 1), np.take_along_axis(scores, wanted, 1), atol=1e-6)
    assert (ranking == wanted).mean() > 0.999


def test_a_ranking_of_few_documents_holds_them_all(vectors: tuple[np.ndarray, np.ndarray]):
    targets, documents = vectors
    ranking = Teacher("mine").ranking(targets[:5], documents[:7])
    assert ranking.shape == (5, 7)
    assert (np.sort(ranking, axis=1) == np.arange(7)).all()


def test_a_ranking_is_computed_once(
    vectors: tuple[np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    targets, documents = vectors
    first = np.array(Teacher("mine", cache_dir=tmp_path).ranking(targets, documents, k=5))
    with monkeypatch.context() as patch:
        patch.setattr(teacher_module, "search", None)
        again = Teacher("mine", cache_dir=tmp_path).ranking(targets, documents, k=5)
    np.testing.assert_array_equal(first, again)
    other = Teacher("mine", cache_dir=tmp_path).ranking(-targets, documents, k=5)
    assert not np.array_equal(first, other)
    assert Teacher("mine", cache_dir=tmp_path).ranking(targets, documents, k=6).shape == (1500, 6)


def test_search_gives_scores_best_first(vectors: tuple[np.ndarray, np.ndarray]):
    targets, documents = vectors
    scores, rows = search(documents, targets, 10)
    assert scores.shape == rows.shape == (1500, 10)
    assert (np.diff(scores, axis=1) <= 0).all()
    np.testing.assert_allclose(scores, np.take_along_axis(targets @ documents.T, rows, 1), atol=1e-5)


@pytest.mark.parametrize("changed", [{"max_seq_length": 128}, {"prompts": {"document": "passage: "}}])
def test_a_teacher_that_reads_texts_otherwise_does_not_meet_old_vectors(tmp_path: Path, changed: dict):
    teacher = Teacher("a", cache_dir=tmp_path)
    teacher.documents(CORPUS)
    FakeSentenceTransformer.encoded.clear()
    teacher.documents(CORPUS)
    assert not FakeSentenceTransformer.encoded
    vars(teacher.model).update(changed)
    teacher.documents(CORPUS)
    assert len(FakeSentenceTransformer.encoded) == len(CORPUS)


def test_half_precision_has_a_cache_of_its_own(tmp_path: Path):
    teacher = Teacher("mine", cache_dir=tmp_path)
    teacher.cached(TEXTS, "query", "exact")
    before = len(FakeSentenceTransformer.encoded)
    teacher.cached(TEXTS, "query", "fast", half_precision=True)
    assert len(FakeSentenceTransformer.encoded) == before + len(TEXTS)


def test_the_stub_of_the_other_tests_has_the_interface(stub_teacher: StubTeacher):
    for name in ("dimension", "fingerprint", "name_or_path", "revision", "encode", "cached", "documents", "ranking"):
        assert hasattr(stub_teacher, name) and hasattr(Teacher("mine"), name), name
    vectors = stub_teacher.encode(TEXTS)
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32 and len(stub_teacher.fingerprint) == 64
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(vectors, StubTeacher().encode(TEXTS))


# The real thing


@pytest.fixture
def real_teacher() -> Teacher:
    if not REAL_TEACHER:
        pytest.skip("set NATIVE_RETRIEVAL_TEACHER to the path of a sentence-transformers model")
    return Teacher(REAL_TEACHER)


def test_a_real_teacher(real_teacher: Teacher):
    vectors = real_teacher.encode(["Who built the bridge?", "The bridge was built by masons.", "Wolves hunt in packs."])
    assert vectors.shape == (3, real_teacher.dimension)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
    assert len(real_teacher.fingerprint) == 64
    assert same_teacher(real_teacher.fingerprint, Teacher(REAL_TEACHER, batch_size=2).fingerprint)


def test_half_precision_is_close(real_teacher: Teacher):
    texts = ["Who built the bridge?", "Wolves hunt in packs and mate for life. " * 20, "a"]
    exact, fast = real_teacher.encode(texts), real_teacher.encode(texts, half_precision=True)
    assert fast.dtype == np.float32 and ((exact * fast).sum(1) > 0.999).all()
