"""
The teacher's documents in Qdrant, behind the interface of [`index.DocumentIndex`]: embedded (a folder), a server, a cluster.

    from qdrant_client import QdrantClient

    client = QdrantClient(path="my_qdrant")  # or QdrantClient(url="http://...")
    index = QdrantIndex.build(client, "documents", corpus, vectors, teacher.fingerprint, teacher.name_or_path)
    index.check_model(model.config)
    scores, rows = index.search(model.embed_query(messages), k=5)
    titles = [index.documents[row]["title"] for row in rows[0]]

The collection's metadata says which teacher's vectors it holds, as `index.json` does for a folder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
from qdrant_client import QdrantClient, models

from .index import IndexMismatchError, check_documents, check_model, check_query_vectors

FORMAT_VERSION = 1
RETRIES = 5


class QdrantDocuments(Mapping):
    """The payloads of a collection by point id, fetched when they are asked for."""

    def __init__(self, client: QdrantClient, collection: str):
        self.client, self.collection = client, collection

    def __getitem__(self, point_id) -> dict[str, Any]:
        point_id = int(point_id) if isinstance(point_id, np.integer) else point_id
        if not (points := self.client.retrieve(self.collection, [point_id])):
            raise KeyError(point_id)
        return points[0].payload

    def __len__(self) -> int:
        return self.client.count(self.collection, exact=True).count

    def __iter__(self) -> Iterator:
        offset = None
        while True:
            points, offset = self.client.scroll(self.collection, limit=1000, offset=offset, with_payload=False)
            yield from (point.id for point in points)
            if offset is None:
                return


class QdrantIndex:
    """
    Make one with `QdrantIndex.build`, `QdrantIndex.load`, or, for a collection that is not ours, `QdrantIndex.attach`.

    Attributes:
        documents: payload of each document by point id, which `search` gives as its row.
        info: `teacher_name`, `teacher_fingerprint`, `dimension`.
    """

    def __init__(self, client: QdrantClient, collection: str, info: Mapping[str, Any]):
        self.client, self.collection, self.info = client, collection, dict(info)
        self.documents = QdrantDocuments(client, collection)

    def __len__(self) -> int:
        return len(self.documents)

    @classmethod
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
        Uploads documents in batches, with retries. Stopped half way, the same call goes on where it was.

        Args:
            documents: columns `_id` (unique), `title`, `text`; further columns become payload too, for filters.
            vectors: `(num_documents, dimension)`, float32, L2-normalised, row i for document i.

        Raises:
            ValueError: documents or vectors that do not fit; the message names the document.
            IndexMismatchError: the collection exists, and holds other documents or another teacher's vectors.
        """
        check_documents(documents, vectors)
        metadata = {
            "format_version": FORMAT_VERSION,
            "teacher_name": teacher_name,
            "teacher_fingerprint": teacher_fingerprint,
            "dimension": vectors.shape[1],
            "num_documents": len(documents),
            "sha256": _digest(documents, vectors),
        }
        done = 0
        if client.collection_exists(collection):
            seen = client.get_collection(collection).config.metadata or {}
            for name in ("format_version", "teacher_fingerprint", "num_documents", "sha256"):
                if seen.get(name) != metadata[name]:
                    raise IndexMismatchError(
                        f"collection {collection!r} has {name} {seen.get(name)}, wanted {metadata[name]}; "
                        "name another collection, or delete this one"
                    )
            done = client.count(collection, exact=True).count  # points are numbered, and uploaded in order
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
    def load(cls, client: QdrantClient, collection: str) -> "QdrantIndex":
        """
        Raises:
            IndexMismatchError: the collection is not there, not ours (see `attach`), or was not finished.
        """
        metadata = _collection(client, collection).config.metadata or {}
        if metadata.get("format_version") != FORMAT_VERSION:
            raise IndexMismatchError(
                f"collection {collection!r} does not say whose vectors it holds; QdrantIndex.attach takes it on trust"
            )
        if (count := client.count(collection, exact=True).count) != metadata["num_documents"]:
            raise IndexMismatchError(
                f"collection {collection!r} holds {count} of {metadata['num_documents']} documents; "
                "QdrantIndex.build with the same documents goes on"
            )
        return cls(client, collection, metadata)

    @classmethod
    def attach(
        cls, client: QdrantClient, collection: str, teacher_fingerprint: str, teacher_name: str
    ) -> "QdrantIndex":
        """A collection that another program has filled with this teacher's vectors; nothing in it is changed."""
        space = _collection(client, collection).config.params.vectors
        if not isinstance(space, models.VectorParams):
            raise ValueError(f"collection {collection!r} has several named vectors; a query vector needs a single one")
        info = {"teacher_name": teacher_name, "teacher_fingerprint": teacher_fingerprint, "dimension": space.size}
        return cls(client, collection, info)

    def search(self, vectors: np.ndarray, k: int, query_filter: models.Filter | None = None) -> tuple:
        """
        The k nearest documents of every query, among those that pass the filter.

        Returns:
            `scores`, descending, and `rows`, the point ids, both `(num_queries, k)`; ends that a filter leaves empty have
            score -inf and row -1.
        """
        vectors = check_query_vectors(vectors, k, self.info)
        requests = [
            models.QueryRequest(query=vector.tolist(), limit=k, filter=query_filter, with_payload=False)
            for vector in vectors
        ]
        answers = [answer.points for answer in self.client.query_batch_points(self.collection, requests)]
        width = max((len(points) for points in answers), default=0)
        scores = np.full((len(vectors), width), -np.inf, dtype=np.float32)
        rows = np.full((len(vectors), width), -1, dtype=object)
        for i, points in enumerate(answers):
            scores[i, : len(points)] = [point.score for point in points]
            rows[i, : len(points)] = [point.id for point in points]
        if all(isinstance(row, int) for row in rows.ravel()):
            rows = rows.astype(np.int64)
        return scores, rows

    def check_model(self, config: Any) -> None:
        """Raises `IndexMismatchError` unless a model with this `NativeRetrievalConfig` may search this index."""
        check_model(self.info, config)


def _digest(documents: datasets.Dataset, vectors: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(vectors, dtype=np.float32))
    for batch in documents.iter(batch_size=10_000):
        digest.update(json.dumps(batch, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _collection(client: QdrantClient, name: str) -> models.CollectionInfo:
    if not client.collection_exists(name):
        there = ", ".join(sorted(collection.name for collection in client.get_collections().collections)) or "none"
        raise IndexMismatchError(
            f"collection {name!r} does not exist, there is {there}; name one of these, or make it with QdrantIndex.build"
        )
    return client.get_collection(name)
