"""native_retrieval/qdrant.py, embedded and over HTTP: it finds what a folder's index finds, whoever filled the collection."""

import json
import uuid

import datasets
import numpy as np
import pytest

from native_retrieval.agent import Agent
from native_retrieval.conversations import search_results
from native_retrieval.index import DocumentIndex, IndexMismatchError, label

qdrant_client = pytest.importorskip("qdrant_client")

from qdrant_server import serve  # noqa: E402

from native_retrieval.qdrant import QdrantIndex  # noqa: E402

models = qdrant_client.models
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


def assert_one_line(error: pytest.ExceptionInfo) -> None:
    assert str(error.value) and "\n" not in str(error.value)


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
        with pytest.raises(IndexMismatchError, match="sha256") as error:
            build(client, *others)
        assert_one_line(error)


def test_an_upload_goes_on_with_the_same_teacher_on_another_device(client, made, monkeypatch):
    documents, vectors = made
    upload = qdrant_client.QdrantClient.upload_points

    def stopped(self, collection, points, **settings):
        upload(self, collection, [next(points) for _ in range(11)], **settings)
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(qdrant_client.QdrantClient, "upload_points", stopped)
    with pytest.raises(ConnectionError):
        build(client, documents, vectors)
    monkeypatch.undo()
    elsewhere = f"{int(FINGERPRINT, 16) ^ 0b1011:064x}"  # three of 256 bits, and rounded vectors
    rounded = vectors.astype(np.float16).astype(np.float32)
    assert len(build(client, documents, rounded, fingerprint=elsewhere)) == NUM
    for other in ("cd" * 32, FINGERPRINT[:-2], "", "no fingerprint"):
        with pytest.raises(IndexMismatchError, match="teacher_fingerprint") as error:
            build(client, documents, vectors, fingerprint=other)
        assert_one_line(error)


def test_filters(client, made):
    documents, vectors = made
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


def fill(client, vectors, payloads, config=None, ids=None, name: str | None = None, extra=None) -> None:
    """A collection `theirs`, as another program makes it."""
    config = config or models.VectorParams(size=32, distance=models.Distance.COSINE)
    client.create_collection("theirs", vectors_config=config, **(extra or {}))
    points = [
        models.PointStruct(
            id=ids[i] if ids else i, vector={name: vector.tolist()} if name else vector.tolist(), payload=payload
        )
        for i, (vector, payload) in enumerate(zip(vectors, payloads, strict=False))
    ]
    client.upsert("theirs", points)


def llama_node(**fields) -> dict:
    return {"_node_content": json.dumps(fields | {"embedding": None}), "_node_type": "TextNode", "doc_id": "None"}


PAYLOADS = {
    "ours": ({"_id": "d1", "title": "Malaga", "text": "A port."}, "Malaga", "A port."),
    "LangChain": ({"page_content": "A port.", "metadata": {"title": "Malaga", "page": 3}}, "Malaga", "A port."),
    "LangChain without metadata": ({"page_content": "A port.", "metadata": None}, "", "A port."),
    "LlamaIndex": (llama_node(text="A port.", metadata={"title": "Malaga"}) | {"title": "Malaga"}, "Malaga", "A port."),
    "LlamaIndex's other nodes": (llama_node(text_resource={"text": "A port."}), "", "A port."),
    "LlamaIndex with the text aside": (llama_node(text="") | {"text": "A port."}, "", "A port."),
    "Haystack": ({"content": "A port.", "meta": {"title": "Malaga"}}, "Malaga", "A port."),
    "fastembed": ({"document": "A port."}, "", "A port."),
    "a title alone": ({"title": "Malaga"}, "Malaga", ""),
}


@pytest.mark.parametrize(("payload", "title", "text"), PAYLOADS.values(), ids=PAYLOADS)
def test_documents_of_other_programs_have_a_title_and_a_text(client, made, payload, title, text):
    fill(client, made[1][:1], [payload])
    index = QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher")
    document = index.documents[index.search(made[1][:1], 1)[1][0, 0]]
    assert (document["title"], document["text"]) == (title, text) and document["_id"] == payload.get("_id", "0")
    assert label(document) and document["_id"] and set(payload) <= set(document)
    search_results("Where?", [document])


def test_the_key_of_a_text_can_be_named(client, made):
    fill(client, made[1][:2], [{"abstract": "A port.", "text": "wrong"}, None])
    index = QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher", text_key="abstract")
    assert index.documents[0]["text"] == "A port."
    for key, point in (("abstract", 1), ("body", 0), (None, 1)):
        index = QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher", text_key=key)
        with pytest.raises(ValueError, match="text_key") as error:
            index.documents[point]
        assert_one_line(error)


def test_a_single_named_vector_is_used_by_itself(client, made):
    _, vectors = made
    space = models.VectorParams(size=32, distance=models.Distance.COSINE)
    sparse = {"sparse_vectors_config": {"text-sparse": models.SparseVectorParams()}}
    fill(client, vectors, [{"text": "A."}] * NUM, {"text-dense": space}, name="text-dense", extra=sparse)
    scores, rows = QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher").search(vectors[:5], 3)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4] and np.allclose(scores[:, 0], 1, atol=1e-5)
    with pytest.raises(ValueError, match=r"\['text-dense'\].*vector_name") as error:
        QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher", vector_name="dense")
    assert_one_line(error)


def test_of_several_named_vectors_one_must_be_named(client, made):
    _, vectors = made
    space = models.VectorParams(size=32, distance=models.Distance.COSINE)
    other = models.VectorParams(size=8, distance=models.Distance.DOT)
    fill(client, vectors, [{"text": "A."}] * NUM, {"title": other, "body": space}, name="body")
    with pytest.raises(ValueError, match=r"several named vectors \['body', 'title'\].*vector_name") as error:
        QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher")
    assert_one_line(error)
    index = QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher", vector_name="body")
    assert index.info["dimension"] == 32 and index.search(vectors[:5], 1)[1].ravel().tolist() == [0, 1, 2, 3, 4]


def test_a_collection_without_dense_vectors_is_refused(client):
    client.create_collection("theirs", {}, sparse_vectors_config={"words": models.SparseVectorParams()})
    with pytest.raises(ValueError, match="dense vectors") as error:
        QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher")
    assert_one_line(error)


@pytest.mark.parametrize("distance", [models.Distance.COSINE, models.Distance.DOT, models.Distance.EUCLID])
def test_scores_are_cosines_and_fall_whatever_the_distance(client, made, distance):
    _, vectors = made
    fill(client, vectors, [{"text": "A."}] * NUM, models.VectorParams(size=32, distance=distance))
    queries = np.random.default_rng(1).standard_normal((5, 32)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    scores, rows = QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher").search(queries, 6)
    cosines = queries @ vectors.T
    assert np.array_equal(rows, np.argsort(-cosines, axis=1)[:, :6])
    assert np.allclose(scores, np.take_along_axis(cosines, rows, axis=1), atol=1e-5)


def test_a_distance_of_another_order_is_refused(client, made):
    _, vectors = made
    fill(client, vectors, [{"text": "A."}] * NUM, models.VectorParams(size=32, distance=models.Distance.MANHATTAN))
    with pytest.raises(ValueError, match="Manhattan") as error:
        QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher")
    assert_one_line(error)


@pytest.mark.parametrize("named", [False, True])
def test_distances_between_vectors_that_are_not_unit_are_refused(client, made, named):
    _, vectors = made
    space = models.VectorParams(size=32, distance=models.Distance.EUCLID)
    fill(client, 3 * vectors, [{}] * NUM, {"a": space} if named else space, name="a" if named else None)
    with pytest.raises(ValueError, match="norm 3") as error:
        QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher")
    assert_one_line(error)


def test_ids_of_any_kind(client, made):
    _, vectors = made
    ids = [7, str(uuid.UUID(int=5)), 2**63 + 5, *range(100, 137)]
    fill(client, vectors, [{"text": f"Text {i}."} for i in range(NUM)], ids=ids)
    index = QdrantIndex.attach(client, "theirs", FINGERPRINT, "a-teacher")
    _, rows = index.search(vectors, 1)
    assert rows.ravel().tolist() == ids
    assert [index.documents[row]["text"] for row in rows.ravel()] == [f"Text {i}." for i in range(NUM)]
    assert sorted(map(str, index.documents)) == sorted(map(str, ids))
    _, rows = index.search(vectors[3:6], 1)  # whole numbers alone
    assert rows.dtype == np.int64 and index.documents[rows[0, 0]]["text"] == "Text 3."
    for missing in (-1, np.int64(-1), 8, str(uuid.UUID(int=8))):
        with pytest.raises(KeyError):
            index.documents[missing]


def test_no_queries_are_fine_and_k_may_exceed_the_collection(client, made):
    index = build(client, *made)
    scores, rows = index.search(np.empty((0, 32), dtype=np.float32), 3)
    assert len(scores) == len(rows) == 0
    assert index.search(made[1][:2], np.int64(1000))[1].shape == (2, NUM)


def calls(client) -> dict:
    documents = datasets.Dataset.from_dict({"_id": ["a"], "title": [""], "text": ["A."]})
    attached = QdrantIndex(client, "theirs", {"teacher_name": "t", "teacher_fingerprint": "ab", "dimension": 4})
    unit = np.eye(1, 4, dtype=np.float32)
    return {
        "build": lambda: QdrantIndex.build(client, "theirs", documents, unit, "ab", "t"),
        "load": lambda: QdrantIndex.load(client, "theirs"),
        "attach": lambda: QdrantIndex.attach(client, "theirs", "ab", "t"),
        "search": lambda: attached.search(unit, 1),
        "length": lambda: len(attached),
        "document": lambda: attached.documents[0],
        "ids": lambda: list(attached.documents),
    }


@pytest.mark.parametrize("grpc", [False, True], ids=["HTTP", "gRPC"])
@pytest.mark.parametrize("action", calls(None))
def test_a_server_that_is_not_there_is_one_line(action, grpc):
    port = {"grpc_port": 9, "prefer_grpc": True} if grpc else {}
    client = qdrant_client.QdrantClient(url="http://127.0.0.1:9", check_compatibility=False, timeout=5, **port)
    with pytest.raises(ConnectionError, match="cannot be reached") as error:
        calls(client)[action]()
    assert_one_line(error)


@pytest.mark.parametrize("action", calls(None))
def test_a_server_that_refuses_is_one_line(action):
    with serve() as url:
        client = qdrant_client.QdrantClient(url=f"{url}/elsewhere", check_compatibility=False)
        with pytest.raises(OSError, match="status 404") as error:
            calls(client)[action]()
    assert_one_line(error)


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
        prompt = model.processor.encode([*agent.messages, agent.results])
        seen = model.tokenizer.decode(prompt)
        assert len(prompt) <= 400 and "and the old bridge" in seen and seen.count(question) == 2
        "".join(agent.answer())
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
