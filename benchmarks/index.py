# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Large indexes: exact search, a graph, and inverted lists, over a million vectors.

    python benchmarks/index.py --index .cache/demo/index --output results/bench-index.json

The vectors are copies of a real index's vectors, with noise of a tenth to a half of their length, so that near and far
neighbours lie as they do in text. The queries are other such copies, one at a time, as an agent sends them. Recall@10 is
against exact search. `native_retrieval.index.default_kind` chooses by this table.
"""

import sys
import tempfile
import time
from pathlib import Path

import datasets
import faiss
import numpy as np
from tqdm.auto import tqdm

from benchmarks.common import parser as command_parser
from benchmarks.common import plot, write
from native_retrieval.cli import one_line_errors
from native_retrieval.index import DocumentIndex, default_kind
from native_retrieval.results import environment

TOP_K = 10
# One build serves all its search parameters.
KINDS = {
    "Flat": [""],
    "HNSW32,SQfp16": ["efSearch=64", "efSearch=128", "efSearch=256"],
    "IVF1024,PQ96x4fs,Refine(SQfp16)": ["nprobe=16,k_factor_rf=8", "nprobe=64,k_factor_rf=16"],
}


def perturbed(real: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` unit vectors around the rows of `real`."""
    vectors = np.empty((count, real.shape[1]), dtype=np.float32)
    for begin in range(0, count, 100_000):
        rows = real[rng.integers(len(real), size=min(100_000, count - begin))]
        noise = rng.standard_normal(rows.shape, dtype=np.float32) / np.sqrt(rows.shape[1])
        rows = rows + rng.uniform(0.1, 0.5, size=(len(rows), 1)).astype(np.float32) * noise
        vectors[begin : begin + len(rows)] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return vectors


def build(vectors: np.ndarray, kind: str, folder: Path) -> tuple[Path, float]:
    """An index directory and the seconds that it took."""
    documents = datasets.Dataset.from_dict(
        {
            "_id": [str(row) for row in range(len(vectors))],
            "title": [""] * len(vectors),
            "text": ["A document."] * len(vectors),
        }
    )
    begin = time.perf_counter()
    directory = folder / kind.replace(",", "-")
    DocumentIndex.build(documents, vectors, "00", "perturbed", directory, kind=(kind, ""))
    return directory, time.perf_counter() - begin


def search(index: DocumentIndex, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows found, and milliseconds of each query."""
    index.search(queries[:20], TOP_K)  # reads the pages
    rows, times = [], []
    for query in queries:
        begin = time.perf_counter()
        rows.append(index.search(query[None], TOP_K)[1][0])
        times.append(1000 * (time.perf_counter() - begin))
    return np.array(rows), np.array(times)


def draw(result: dict, path: Path) -> None:
    rows = result["rows"]
    title = f"Recall@10 against the exact search, {rows[0]['vectors']:,} vectors"
    with plot(path, title, "Milliseconds a query, median") as axes:
        for kind in dict.fromkeys(row["kind"].split(" ")[0] for row in rows):
            points = [row for row in rows if row["kind"].split(" ")[0] == kind]
            axes.plot([row["p50_ms"] for row in points], [row["recall@10"] for row in points], "o-", label=kind)
        for row in rows:
            if row["default"]:
                text = {"xytext": (0, -14), "textcoords": "offset points", "fontsize": 8}
                axes.annotate("default", (row["p50_ms"], row["recall@10"]), **text)
        axes.axhline(0.97, color="#B0B0B0", linewidth=1)
        axes.set_xscale("log")


def measure(kind: str, vectors: np.ndarray, queries: np.ndarray, wanted: np.ndarray | None, folder: Path) -> tuple:
    """(a row for each of a kind's search parameters, what the first of them finds)."""
    directory, build_s = build(vectors, kind, folder)
    begin = time.perf_counter()
    index = DocumentIndex.load(directory)
    load_s = time.perf_counter() - begin
    measured = []
    for parameters in KINDS[kind]:
        if parameters:
            faiss.ParameterSpace().set_index_parameters(index.vectors, parameters)
        rows, times = search(index, queries)
        wanted = rows if wanted is None else wanted
        hits = [len(set(a) & set(b)) / TOP_K for a, b in zip(rows, wanted, strict=True)]
        measured.append(
            {
                "kind": f"{kind} {parameters}".strip(),
                "vectors": len(vectors),
                "build_s": round(build_s, 1),
                "load_s": round(load_s, 3),
                "p50_ms": round(float(np.percentile(times, 50)), 3),
                "p95_ms": round(float(np.percentile(times, 95)), 3),
                "recall@10": round(float(np.mean(hits)), 4),
                "bytes_per_vector": round((directory / "index.faiss").stat().st_size / len(vectors), 1),
                "default": (kind, parameters) == default_kind(len(vectors)),
            }
        )
    return measured, wanted


@one_line_errors("index.py")
def main() -> None:
    parser = command_parser("index.py", __doc__, "threads", "output")
    parser.add_argument("--index", required=True, help="index directory whose vectors are copied")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--queries", type=int, default=200, help="(default: %(default)s)")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    faiss.omp_set_num_threads(arguments.threads)
    source = DocumentIndex.load(arguments.index).vectors
    rng = np.random.default_rng(0)
    real = source.reconstruct_n(0, source.ntotal)
    vectors, queries = perturbed(real, arguments.vectors, rng), perturbed(real, arguments.queries, rng)
    rows, wanted = [], None
    with tempfile.TemporaryDirectory() as folder:
        for kind in tqdm(KINDS, desc="Kinds of index", unit="index"):  # the first is exact
            more, wanted = measure(kind, vectors, queries, wanted, Path(folder))
            rows += more
    for row in rows:
        print(
            "{kind:57} build {build_s:6.1f} s  load {load_s:.2f} s  p50 {p50_ms:7.2f} ms  p95 {p95_ms:7.2f} ms  "
            "recall@10 {recall@10:.3f}  {bytes_per_vector:.0f} bytes".format(**row)
            + row["default"] * "  default"
        )
    write({"environment": environment(), "threads": arguments.threads, "rows": rows}, arguments.output, draw)


if __name__ == "__main__":
    sys.exit(main())
