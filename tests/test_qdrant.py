"""native_retrieval/qdrant.py, embedded and over HTTP: what a folder's index finds, and nothing of another teacher."""

import datasets
import numpy as np
import pytest

from native_retrieval.agent import Agent
from native_retrieval.index import DocumentIndex, IndexMismatchError

qdrant_client = pytest.importorskip("qdrant_client")

from qdrant_server import serve  # noqa: E402

from native_retrieval.qdrant import QdrantIndex  # noqa: E402

FINGERPRINT = "ab" * 32
NUM = 40


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((NUM, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [{"_id": f"d{i}", "title": f"Title {i}", "text": f"Text {i}.", "year": 1900 + i} for i in range(NUM)]
    return datasets.Dataset.from_list(rows), vectors


@pytest.fixture(params=["embedded", "http"])
def client(request, tmp_path):
    if request.param == "embedded":
        client = qdrant_client.QdrantClient(path=str(tmp_path / "qdrant"))
        yield client
        client.close()
    else:
        with serve() as url:
            yield qdrant_client.QdrantClient(url=url, check_compatibility=False)


def build(client, documents, vectors, fingerprint=FINGERPRINT, **settings) -> QdrantIndex:
    return QdrantIndex.build(client, "documents", documents, vectors, fingerprint, "a-teacher", **settings)


def test_it_finds_what_a_folder_finds(client, made, tmp_path):
    documents, vectors = made
    folder = DocumentIndex.build(documents, vectors, FINGERPRINT, "a-teacher", tmp_path / "index")
    queries = vectors[:5] + 0.1
    index = build(client, documents, vectors, batch_size=7)
    assert len(index) == NUM and list(index.documents) == list(range(NUM))
    wanted_scores, wanted_rows = folder.search(queries / np.linalg.norm(queries, axis=1, keepdims=True), 6)
    scores, rows = index.search(queries, 6)
    assert np.array_equal(rows, wanted_rows) and np.allclose(scores, wanted_scores, atol=1e-5)
    assert index.documents[rows[0, 0]] == documents[int(rows[0, 0])]


def test_it_is_opened_again_and_goes_on_where_it_stopped(client, made, monkeypatch):
    documents, vectors = made
    upload = qdrant_client.QdrantClient.upload_points

    def stopped(self, collection, points, **settings):
        upload(self, collection, [next(points) for _ in range(11)], **settings)
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(qdrant_client.QdrantClient, "upload_points", stopped)
    with pytest.raises(ConnectionError):
        build(client, documents, vectors)
    monkeypatch.undo()
    with pytest.raises(IndexMismatchError, match="11 of 40"):
        QdrantIndex.load(client, "documents")
    sent = []
    monkeypatch.setattr(
        qdrant_client.QdrantClient,
        "upload_points",
        lambda self, collection, points, **settings: upload(
            self, collection, (sent.append(point.id) or point for point in points), **settings
        ),
    )
    index = build(client, documents, vectors)
    assert sent == list(range(11, NUM)) and len(QdrantIndex.load(client, "documents")) == NUM
    assert index.search(vectors[:1], 1)[1].tolist() == [[0]]


def test_other_documents_are_not_mistaken_for_these(client, made):
    documents, vectors = made
    build(client, documents, vectors)
    assert len(build(client, documents, vectors)) == NUM
    edited = documents.map(lambda row: {**row, "text": row["text"].replace("Text 7.", "Text seven.")})
    for others in ((edited, vectors), (documents, vectors[::-1].copy())):
        with pytest.raises(IndexMismatchError, match="sha256"):
            build(client, *others)


def test_filters(client, made):
    documents, vectors = made
    models = qdrant_client.models
    late = models.Filter(must=[models.FieldCondition(key="year", range=models.Range(gte=1930))])
    _, rows = build(client, documents, vectors).search(vectors[:3], 20, late)
    assert rows.shape == (3, 10) and (rows >= 30).all()


def test_other_teachers_are_refused(client, made, make_model):
    documents, vectors = made
    index = build(client, documents, vectors)
    with pytest.raises(IndexMismatchError, match="teacher_fingerprint"):
        build(client, documents, vectors, fingerprint="cd" * 32)
    with pytest.raises(IndexMismatchError, match="a-teacher"):
        index.check_model(make_model(teacher_name_or_path="another", teacher_fingerprint="00" * 32).config)


def test_a_collection_of_someone_elses_is_attached_to(client, made):
    documents, vectors = made
    models = qdrant_client.models
    space = models.VectorParams(size=32, distance=models.Distance.COSINE)
    client.create_collection("theirs", vectors_config=space)
    name = "11111111-1111-1111-1111-111111111111"
    client.upsert("theirs", [models.PointStruct(id=name, vector=vectors[0].tolist(), payload={"title": "Theirs"})])
    with pytest.raises(IndexMismatchError, match="attach"):
        QdrantIndex.load(client, "theirs")
    index = QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher")
    _, rows = index.search(vectors[:1], 3)
    assert rows.tolist() == [[name]] and index.documents[rows[0, 0]]["title"] == "Theirs"
    with pytest.raises(KeyError):
        index.documents["22222222-2222-2222-2222-222222222222"]


@pytest.mark.parametrize("vectors, k", [(np.zeros((1, 32)), 1), (np.ones((1, 8)), 1), (np.ones((1, 32)), 0)])
def test_bad_queries_are_named(client, made, vectors, k):
    with pytest.raises(ValueError, match="wanted"):
        build(client, *made).search(vectors, k)


def test_an_agent_searches_it(client, made, make_model):
    documents, vectors = made
    model = make_model(teacher_name_or_path="a-teacher", teacher_fingerprint=FINGERPRINT)
    agent = Agent(model, build(client, documents, vectors), max_new_tokens=3)
    found = agent.search("Who?")
    assert len(found.documents) == 5 and found.documents[0]["title"].startswith("Title")
    list(agent.answer())


def test_a_document_longer_than_a_prompt_is_read_in_part(made, make_model, tmp_path):
    documents, vectors = made
    documents = documents.map(lambda row: {**row, "text": row["text"] + " and the old bridge" * 400})
    model = make_model(teacher_name_or_path="a-teacher", teacher_fingerprint=FINGERPRINT, max_prompt_tokens=400)
    index = DocumentIndex.build(documents, vectors, FINGERPRINT, "a-teacher", tmp_path / "index")
    agent = Agent(model, index, num_read=2, max_new_tokens=3)
    for question in ("When was the bridge opened?", "And by whom?"):
        agent.search(question)
        assert agent.results["content"].count("and the old bridge") > 1 and question in agent.results["content"]
        "".join(agent.answer())
        asked = agent.messages[:-1]  # which the documents leave room for
        assert len(model.build_prompt([*asked, agent.results])) > len(model.build_prompt(asked))
    assert [message["role"] for message in agent.messages] == ["user", "assistant"] * 2


def test_a_dropped_connection_is_tried_again(made, tmp_path):
    dropped = []

    def drop(method: str, path: str) -> bool:
        if method == "PUT" and path.endswith("/points") and len(dropped) < 2:
            dropped.append(path)
            return True
        return False

    with serve(drop) as url:
        client = qdrant_client.QdrantClient(url=url, check_compatibility=False)
        index = build(client, *made, batch_size=16)
        assert len(dropped) == 2 and len(index) == NUM
        assert index.search(made[1][7:8], 1)[1].tolist() == [[7]]
