"""
Qdrant's HTTP routes on the loopback, as far as native_retrieval/qdrant.py goes: bodies are read and answered in the models
of Qdrant's own client, and what they ask for is done by its embedded engine.
"""

import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from pydantic import TypeAdapter
from qdrant_client import QdrantClient, models

ROUTES: list[tuple[str, str, Callable]] = []


def route(method: str, pattern: str):
    return lambda function: ROUTES.append((method, rf"/collections/(?P<name>[\w-]+){pattern}", function)) or function


@route("GET", "/exists")
def exists(engine: QdrantClient, name: str, body: bytes):
    return {"exists": engine.collection_exists(name)}


@route("GET", "")
def describe(engine: QdrantClient, name: str, body: bytes):
    return engine.get_collection(name)


@route("PUT", "")
def create(engine: QdrantClient, name: str, body: bytes):
    wanted = models.CreateCollection.model_validate_json(body)
    sparse = wanted.sparse_vectors
    return engine.create_collection(name, wanted.vectors, sparse_vectors_config=sparse, metadata=wanted.metadata)


@route("PUT", "/points")
def upsert(engine: QdrantClient, name: str, body: bytes):
    engine.upsert(name, models.PointsList.model_validate_json(body).points)
    return {"operation_id": 0, "status": "completed"}


@route("POST", "/points")
def retrieve(engine: QdrantClient, name: str, body: bytes):
    wanted = models.PointRequest.model_validate_json(body)
    return engine.retrieve(name, wanted.ids, with_payload=wanted.with_payload, with_vectors=wanted.with_vector)


@route("POST", "/points/count")
def count(engine: QdrantClient, name: str, body: bytes):
    return engine.count(name, exact=models.CountRequest.model_validate_json(body).exact)


@route("POST", "/points/scroll")
def scroll(engine: QdrantClient, name: str, body: bytes):
    wanted = models.ScrollRequest.model_validate_json(body)
    parts = {"with_payload": wanted.with_payload, "with_vectors": wanted.with_vector or False}
    points, after = engine.scroll(name, limit=wanted.limit, offset=wanted.offset, **parts)
    return {"points": _plain(points), "next_page_offset": after}


@route("POST", "/points/query/batch")
def search(engine: QdrantClient, name: str, body: bytes):
    wanted = models.QueryRequestBatch.model_validate_json(body)
    return engine.query_batch_points(name, wanted.searches)


def _plain(value):
    return TypeAdapter(type(value)).dump_python(value, mode="json")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: QdrantClient
    drop: Callable[[str, str], bool]
    lock = threading.Lock()  # the embedded engine is for one thread

    def log_message(self, *args) -> None:
        pass

    def _serve(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.drop(self.command, path):
            self.close_connection = True
            self.connection.close()
            return
        status, answer = 404, {"status": {"error": f"no route {self.command} {path}"}}
        for method, pattern, function in ROUTES:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                try:
                    with self.lock:
                        status, answer = 200, {"result": _plain(function(self.engine, found["name"], body))}
                    answer |= {"status": "ok", "time": 0.0}
                except ValueError as error:  # what the engine, or a model, does not take
                    status, answer = 400, {"status": {"error": str(error)}}
                break
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = _serve


@contextmanager
def serve(drop: Callable[[str, str], bool] = lambda method, path: False):
    """The URL of a server with no collections; `drop(method, path)` says which requests break off."""
    handler = type("Handler", (_Handler,), {"engine": QdrantClient(":memory:"), "drop": staticmethod(drop)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
