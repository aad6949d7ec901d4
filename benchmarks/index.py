# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
The index at size: exact search, a graph, and inverted lists, over a million vectors.

    python benchmarks/index.py --index .cache/demo/index --output results/bench-index.json

The vectors are those of a real index, each repeated with noise of a tenth to a half of its length, so that near and far
neighbours lie as they do in text; the queries are other such copies. Single queries, as an agent sends them; recall@10 is
against the exact search. `native_retrieval.index.default_kind` takes its choice from this table.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
import faiss
import numpy as np
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.index import DocumentIndex, default_kind
from native_retrieval.report import environment

TOP_K = 10
# One build serves all its search parameters.
KINDS = {
    "Flat": [
        "",
    ],
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


def draw(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(row["kind"].split(" ")[0] for row in rows):
        points = [row for row in rows if row["kind"].split(" ")[0] == kind]
        axes.plot([row["p50_ms"] for row in points], [row["recall@10"] for row in points], "o-", label=kind)
        for row in points:
            if row["default"]:
                axes.annotate(
                    "default", (row["p50_ms"], row["recall@10"]), (0, -14), textcoords="offset points", fontsize=8
                )
    axes.axhline(0.97, color="#B0B0B0", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("Milliseconds a query, median")
    axes.set_title(f"Recall@10 against the exact search, {rows[0]['vectors']:,} vectors", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


@one_line_errors("index.py")
def main() -> None:
    parser = CommandParser("index.py", __doc__)
    parser.add_argument("--index", required=True, help="index directory whose vectors are repeated")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--queries", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="the JSON file to write; a figure goes into figures/ beside it")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    faiss.omp_set_num_threads(arguments.threads)
    source = DocumentIndex.load(arguments.index).vectors
    rng = np.random.default_rng(0)
    real = source.reconstruct_n(0, source.ntotal)
    vectors, queries = perturbed(real, arguments.vectors, rng), perturbed(real, arguments.queries, rng)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "threads": arguments.threads,
        "rows": [],
    }
    wanted = None
    with tempfile.TemporaryDirectory() as folder:
        for kind, settings in tqdm(KINDS.items(), desc="Kinds of index", unit="index"):
            directory, build_s = build(vectors, kind, Path(folder))
            begin = time.perf_counter()
            index = DocumentIndex.load(directory)
            load_s = time.perf_counter() - begin
            for parameters in settings:
                if parameters:
                    faiss.ParameterSpace().set_index_parameters(index.vectors, parameters)
                rows, times = search(index, queries)
                wanted = rows if wanted is None else wanted
                hits = [len(set(a) & set(b)) / TOP_K for a, b in zip(rows, wanted, strict=True)]
                result["rows"].append(
                    {
                        "kind": f"{kind} {parameters}".strip(),
                        "vectors": arguments.vectors,
                        "build_s": round(build_s, 1),
                        "load_s": round(load_s, 3),
                        "p50_ms": round(float(np.percentile(times, 50)), 3),
                        "p95_ms": round(float(np.percentile(times, 95)), 3),
                        "recall@10": round(float(np.mean(hits)), 4),
                        "bytes_per_vector": round((directory / "index.faiss").stat().st_size / arguments.vectors, 1),
                        "default": (kind, parameters) == default_kind(arguments.vectors),
                    }
                )
    output = Path(arguments.output)
    figures = output.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    draw(result["rows"], figures / f"{output.stem}.png")
    for row in result["rows"]:
        print(
            f"{row['kind']:45} build {row['build_s']:6.1f} s  load {row['load_s']:.2f} s  p50 {row['p50_ms']:7.2f} ms  "
            f"p95 {row['p95_ms']:7.2f} ms  recall@10 {row['recall@10']:.3f}  {row['bytes_per_vector']:.0f} bytes"
            + ("  default" if row["default"] else "")
        )


if __name__ == "__main__":
    sys.exit(main())
