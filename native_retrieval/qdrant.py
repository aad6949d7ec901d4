"""
The teacher's documents in Qdrant, with the interface of [`index.DocumentIndex`]: embedded (a folder), a server, a cluster.

    from qdrant_client import QdrantClient

    client = QdrantClient(path="my_qdrant")  # or QdrantClient(url="http://...")
    index = QdrantIndex.build(client, "documents", corpus, vectors, teacher.fingerprint, teacher.name_or_path)
    index.check_model(model.config)
    scores, rows = index.search(model.embed_query(messages), k=5)
    titles = [index.documents[row]["title"] for row in rows[0]]

The collection's metadata names the teacher of the vectors, as `index.json` does for a folder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import grpc
import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from .index import NORM_TOLERANCE, IndexMismatchError, check_documents, check_model, check_query_vectors
from .teacher import same_teacher

FORMAT_VERSION = 1
RETRIES = 5
SAMPLE = 32  # points that are looked at where all would be too many
# Keys of a payload under which programs keep a document's text; LlamaIndex keeps it in `_node_content`.
TEXT_KEYS = ("text", "page_content", "content", "document", "chunk", "body", "passage")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns the errors of Qdrant's client about the network and the server into an `OSError` of one line."""
    try:
        yield
    except UnexpectedResponse as error:
        said = " ".join(error.content.decode(errors="replace")[:200].split())
        raise OSError(
            f"Qdrant's server refuses the request, status {error.status_code} ({said}); check the client's api_key."
        ) from error
    except (ResponseHandlingException, grpc.RpcError) as error:
        said = error.code().name if isinstance(error, grpc.Call) else type(error.source).__name__
        raise ConnectionError(
            f"Qdrant's server cannot be reached ({said}); check that it runs, and the client's url, api_key and timeout."
        ) from error


class QdrantDocuments(Mapping):
    """
    The documents of a collection by point id, fetched when they are asked for: the payload, with `_id`, `title`, `text`.

    In a collection that another program has filled, the text is at `text_key`, or where LangChain, LlamaIndex and many
    others keep it. The title is that of the payload or its metadata, or empty.
    """

    def __init__(self, client: QdrantClient, collection: str, text_key: str | None = None):
        self.client, self.collection, self.text_key = client, collection, text_key

    @_one_line_errors()
    def __getitem__(self, point_id) -> dict[str, Any]:
        point_id = int(point_id) if isinstance(point_id, np.integer) else point_id
        if point_id == -1 or not (points := self.client.retrieve(self.collection, [point_id])):
            raise KeyError(point_id)
        payload = points[0].payload or {}
        node = json.loads(payload.get("_node_content") or "{}")  # LlamaIndex's
        parts = [node, node.get("text_resource"), payload, payload.get("metadata"), payload.get("meta")]
        parts = [part for part in parts if isinstance(part, dict)]
        keys = (self.text_key,) if self.text_key else TEXT_KEYS
        texts = [part[key] for part in parts for key in keys if isinstance(part.get(key), str)]
        titles = [part["title"] for part in parts if isinstance(part.get("title"), str)]
        if not texts and (self.text_key or not titles):
            raise ValueError(
                f"Point {point_id} of collection {self.collection!r} has the payload keys {sorted(payload)}, wanted a text "
                f"at {' or '.join(keys)}; name its key with QdrantIndex.attach(..., text_key=...)."
            )
        found = {"_id": str(point_id), **payload, "title": "", "text": next(filter(None, texts), "")}
        return found | ({"title": titles[0]} if titles else {})

    @_one_line_errors()
    def __len__(self) -> int:
        return self.client.count(self.collection, exact=True).count

    def __iter__(self) -> Iterator:
        offset = None
        while True:
            with _one_line_errors():
                points, offset = self.client.scroll(self.collection, limit=1000, offset=offset, with_payload=False)
            yield from (point.id for point in points)
            if offset is None:
                return


class QdrantIndex:
    """
    Make one with `QdrantIndex.build`, `QdrantIndex.load`, or, for a collection that is not ours, `QdrantIndex.attach`.

    Attributes:
        documents: the document of each point id; `search` returns point ids as rows.
        info: `teacher_name`, `teacher_fingerprint`, `dimension`.
        vector_name: the name of the vectors that are searched, `None` if they have none.
        euclidean: whether the collection compares vectors by Euclidean distance.
    """

    def __init__(
        self,
        client: QdrantClient,
        collection: str,
        info: Mapping[str, Any],
        *,
        vector_name: str | None = None,
        text_key: str | None = None,
        euclidean: bool = False,
    ):
        self.client, self.collection, self.info = client, collection, dict(info)
        self.vector_name, self.euclidean = vector_name, euclidean
        self.documents = QdrantDocuments(client, collection, text_key)

    def __len__(self) -> int:
        return len(self.documents)

    @classmethod
    @_one_line_errors()
    def build(
        cls,
        client: QdrantClient,
        collection: str,
        documents: datasets.Dataset,
        vectors: np.ndarray,
        teacher_fingerprint: str,
        teacher_name: str,
        *,
        batch_size: int = 256,
    ) -> "QdrantIndex":
        """
        Uploads documents in batches, with retries. If it was interrupted, the same call goes on where it stopped.

        Args:
            documents: columns `_id` (unique), `title`, `text`; further columns become payload too, for filters.
            vectors: `(num_documents, dimension)`, float32, L2-normalised, row i for document i.

        Raises:
            ValueError: documents or vectors that do not fit; the message names the document.
            IndexMismatchError: the collection exists, and holds other documents or another teacher's vectors.
            OSError: the server gives no answer, or refuses.
        """
        check_documents(documents, vectors)
        metadata = {
            "format_version": FORMAT_VERSION,
            "teacher_name": teacher_name,
            "teacher_fingerprint": teacher_fingerprint,
            "dimension": vectors.shape[1],
            "num_documents": len(documents),
            "sha256": _digest(documents),
        }
        done = 0
        if client.collection_exists(collection):
            seen = client.get_collection(collection).config.metadata or {}
            for name in ("format_version", "teacher_fingerprint", "dimension", "num_documents", "sha256"):
                pair = seen.get(name), metadata[name]
                same = pair[0] == pair[1] or (name == "teacher_fingerprint" and pair[0] and same_teacher(*pair))
                if not same:
                    raise IndexMismatchError(
                        f"Collection {collection!r} has {name} {pair[0]}, wanted {pair[1]}; "
                        "name another collection, or delete this one."
                    )
            done = client.count(collection, exact=True).count  # points are numbered, and uploaded in order
            _check_uploaded(client, collection, vectors[:done])
        else:
            space = models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE)
            client.create_collection(collection, vectors_config=space, metadata=metadata)
        points = (
            models.PointStruct(id=row, vector=vectors[row].tolist(), payload=documents[row])
            for row in range(done, len(documents))
        )
        client.upload_points(collection, points, batch_size=batch_size, max_retries=RETRIES, wait=True)
        return cls.load(client, collection)

    @classmethod
    @_one_line_errors()
    def load(cls, client: QdrantClient, collection: str) -> "QdrantIndex":
        """
        Opens a collection that `build` made.

        Raises:
            IndexMismatchError: the collection does not exist, is not ours (see `attach`), or its upload was interrupted.
            OSError: the server gives no answer, or refuses.
        """
        metadata = _collection(client, collection).config.metadata or {}
        if metadata.get("format_version") != FORMAT_VERSION:
            raise IndexMismatchError(
                f"Collection {collection!r} does not say whose vectors it holds; "
                "QdrantIndex.attach opens it if you know the teacher."
            )
        if (count := client.count(collection, exact=True).count) != metadata["num_documents"]:
            raise IndexMismatchError(
                f"Collection {collection!r} holds {count} of {metadata['num_documents']} documents; "
                "call QdrantIndex.build with the same documents, and it uploads the rest."
            )
        return cls(client, collection, metadata)

    @classmethod
    @_one_line_errors()
    def attach(
        cls,
        client: QdrantClient,
        collection: str,
        teacher_fingerprint: str,
        teacher_name: str,
        *,
        vector_name: str | None = None,
        text_key: str | None = None,
    ) -> "QdrantIndex":
        """
        Opens a collection that another program has filled with this teacher's vectors; nothing in it is changed.

        Args:
            vector_name: the name of the teacher's vectors, if the collection has several named ones.
            text_key: the payload's key for a document's text, if it is an unusual one; see `QdrantDocuments`.

        Raises:
            IndexMismatchError: the collection does not exist.
            ValueError: it is unclear which vectors are the teacher's, or their order would not be that of the cosine.
            OSError: the server gives no answer, or refuses.
        """
        spaces = _collection(client, collection).config.params.vectors or {}
        spaces = {"": spaces} if isinstance(spaces, models.VectorParams) else spaces
        names = list(spaces) if vector_name is None else [vector_name]
        if len(names) != 1 or names[0] not in spaces:
            raise ValueError(
                f"Collection {collection!r} has {'several named' if len(spaces) > 1 else 'the dense'} vectors "
                f"{sorted(spaces)}, wanted a single one or the name of one; give it as vector_name."
            )
        (name,) = names
        distance, dimension = spaces[name].distance, spaces[name].size
        if distance == models.Distance.MANHATTAN:
            raise ValueError(
                f"Collection {collection!r} has Manhattan distance, whose order is not that of the cosine, wanted Cosine, "
                "Dot or Euclid; copy its points into a collection of one of these."
            )
        if distance == models.Distance.EUCLID:
            points, _ = client.scroll(collection, limit=SAMPLE, with_payload=False, with_vectors=True)
            norms = [float(np.linalg.norm(_vector(point, name))) for point in points]
            if bad := [norm for norm in norms if abs(norm - 1) > NORM_TOLERANCE]:
                raise ValueError(
                    f"Collection {collection!r} has Euclidean distance and a vector of norm {bad[0]:.3g}, wanted norm 1, "
                    "as the order is not that of the cosine; copy its points into a collection with Cosine."
                )
        info = {"teacher_name": teacher_name, "teacher_fingerprint": teacher_fingerprint, "dimension": dimension}
        euclidean = distance == models.Distance.EUCLID
        return cls(client, collection, info, vector_name=name or None, text_key=text_key, euclidean=euclidean)

    @_one_line_errors()
    def search(self, vectors: np.ndarray, k: int, query_filter: models.Filter | None = None) -> tuple:
        """
        The k nearest documents of every query, among those that pass the filter.

        Returns:
            `scores`, descending: cosine similarities, or inner products if the collection's distance is Dot. And `rows`,
            the point ids: int64, or of type object if some are UUIDs. Both have at most k columns. Where a filter leaves
            fewer documents, the score is -inf and the row -1.
        """
        vectors = check_query_vectors(vectors, k, self.info)
        requests = [
            models.QueryRequest(
                query=vector.tolist(), limit=int(k), filter=query_filter, with_payload=False, using=self.vector_name
            )
            for vector in vectors
        ]
        answers = self.client.query_batch_points(self.collection, requests) if requests else []
        width = max((len(answer.points) for answer in answers), default=0)
        scores = np.full((len(vectors), width), -np.inf, dtype=np.float32)
        rows = np.full((len(vectors), width), -1, dtype=object)
        for i, answer in enumerate(answers):
            found = np.array([point.score for point in answer.points], dtype=np.float32)
            if self.euclidean:
                found = (np.square(vectors[i]).sum() + 1 - np.square(found)) / 2
            scores[i, : len(found)] = found
            rows[i, : len(found)] = [point.id for point in answer.points]
        if all(isinstance(row, int) and row < 1 << 63 for row in rows.ravel()):
            rows = rows.astype(np.int64)
        return scores, rows

    def check_model(self, config: Any) -> None:
        """Raises `IndexMismatchError` unless a model with this `NativeRetrievalConfig` may search this index."""
        check_model(self.info, config)


def _digest(documents: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for batch in documents.iter(batch_size=10_000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _check_uploaded(client: QdrantClient, collection: str, vectors: np.ndarray) -> None:
    """Raises `IndexMismatchError` unless a sample of the points has these vectors, but for the rounding of devices."""
    sample = sorted({row * len(vectors) // SAMPLE for row in range(SAMPLE)})
    for point in client.retrieve(collection, sample, with_payload=False, with_vectors=True) if len(vectors) else ():
        if np.dot(_vector(point, ""), vectors[point.id]) < 1 - 2 * NORM_TOLERANCE:
            raise IndexMismatchError(
                f"Collection {collection!r} holds another vector for document {point.id}, though the documents' sha256 is "
                "the same, wanted the same vectors; name another collection, or delete this one."
            )


def _vector(point: models.Record, name: str) -> np.ndarray:
    return np.asarray(point.vector[name] if isinstance(point.vector, dict) else point.vector, dtype=np.float32)


def _collection(client: QdrantClient, name: str) -> models.CollectionInfo:
    if not client.collection_exists(name):
        there = ", ".join(sorted(collection.name for collection in client.get_collections().collections)) or "none"
        raise IndexMismatchError(
            f"Collection {name!r} does not exist, there is {there}; name one of these, or make it with QdrantIndex.build."
        )
    return client.get_collection(name)
