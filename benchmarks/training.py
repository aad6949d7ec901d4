# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
The cost of training: hidden states from the cache against hidden states computed in each epoch, the teacher's ranking against
FAISS alone, and the memory of a process that trains on fifty thousand cached queries.

    python benchmarks/training.py --backbone .cache/demo/SmolLM2-135M-Instruct --teacher .cache/demo/all-MiniLM-L6-v2 \\
        --data .cache/demo/data/synthetic --output results/bench-training.json
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import torch

from benchmarks.common import parser as command_parser
from benchmarks.common import write
from native_retrieval.arguments import DataArguments, NativeRetrievalTrainingArguments
from native_retrieval.cli import one_line_errors
from native_retrieval.data import load_task
from native_retrieval.dataset import QuerySet, RetrievalExamples, build_examples, collate
from native_retrieval.features import FeatureStore
from native_retrieval.initialise import from_backbone
from native_retrieval.losses import alignment_loss
from native_retrieval.results import environment
from native_retrieval.teacher import Teacher
from native_retrieval.trainer import NativeRetrievalTrainer

RANKED, RANKING_K = 50_000, 128
CACHED_QUERIES, CACHED_TOKENS, MEMORY_STEPS, BATCH_SIZE = 50_000, 40, 40, 64


def new_model(backbone: str, teacher=None, **fields):
    """An untrained model whose words are chosen by eight attention heads of four layers: which ones changes no speed."""
    heads = [[layer, head] for layer in range(4) for head in (0, 1)]
    return from_backbone(backbone, teacher, selection_heads=heads, **fields)


def train_epoch(model, examples, folder: str) -> float:
    """Seconds of one pass over the examples."""
    args = NativeRetrievalTrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        disable_tqdm=True,
    )
    trainer = NativeRetrievalTrainer(model, args, examples)
    begin = time.perf_counter()
    trainer.train()
    return time.perf_counter() - begin


def hidden_states(model, teacher, task, folder: str, count: int) -> list[dict]:
    """An epoch that computes hidden states as it goes, and one that finds them on disk."""
    rows = []
    queries = task.queries.select(range(min(count, len(task.queries))))
    wanted = {document for gold in queries["gold"] for document in gold}
    corpus = task.corpus.select([i for i, document in enumerate(task.corpus["_id"]) if document in wanted])
    queries = QuerySet(task.name, queries, corpus)
    for what, online in (("an epoch, hidden states online", True), ("an epoch, hidden states cached", False)):
        arguments = DataArguments(cache_dir=folder, online_features=online)
        examples = build_examples(model, teacher, queries, arguments)
        rows.append(row_of(what, len(queries), train_epoch(model, examples, folder)))
    rows[1]["of_online"] = round(rows[1]["seconds"] / rows[0]["seconds"], 4)
    return rows


def ranking(teacher: Teacher) -> list[dict]:
    vectors = unit_vectors(2 * RANKED, teacher.dimension)
    queries, documents = vectors[:RANKED], vectors[RANKED:]
    begin = time.perf_counter()
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents)
    index.search(queries, RANKING_K)
    alone = time.perf_counter() - begin
    begin = time.perf_counter()
    teacher.ranking(queries, documents, RANKING_K)
    ours = time.perf_counter() - begin
    return [
        row_of("FAISS alone: 50,000 queries, 50,000 documents", RANKED, alone),
        {**row_of("the teacher's ranking, kept on disk", RANKED, ours), "of_faiss": round(ours / alone, 3)},
    ]


def memory(backbone: str) -> None:
    """Trains on many cached queries, whose states are a sparse file of zeros, and prints the peak memory in MiB."""
    model = new_model(backbone, embedding_dim=384)
    with tempfile.TemporaryDirectory() as folder:
        shape = (CACHED_QUERIES * CACHED_TOKENS, len(model.config.hidden_state_layers), model.config.hidden_size)
        path = Path(folder) / "states.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=np.int16, shape=shape).flush()
        rng = np.random.default_rng(0)
        vectors = unit_vectors(CACHED_QUERIES, 384)
        starts = np.arange(CACHED_QUERIES) * CACHED_TOKENS
        examples = RetrievalExamples(
            [rng.integers(5, 1000, CACHED_TOKENS).tolist() for _ in range(CACHED_QUERIES)],
            [4] * CACHED_QUERIES,
            vectors,
            vectors,
            [[i] for i in range(CACHED_QUERIES)],
            store=FeatureStore(np.load(path, mmap_mode="r"), starts, np.full(CACHED_QUERIES, CACHED_TOKENS)),
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        begin = time.perf_counter()
        for _ in range(MEMORY_STEPS):
            batch = collate([examples[i] for i in rng.integers(CACHED_QUERIES, size=BATCH_SIZE).tolist()])
            output = model(
                batch["input_ids"], batch["attention_mask"], batch["readout_mask"], batch["hidden_states"].float()
            )
            alignment_loss(output.query_embeddings, batch["targets"]).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - begin
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def memory_row(backbone: str) -> dict:
    """In a process of its own, whose peak starts at this one's: call it first."""
    command = [sys.executable, __file__, "--backbone", backbone, "--memory"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:  # it has said why, in one line
        raise ValueError(done.stderr.strip().rpartition("\n")[2].removeprefix("training.py: "))
    *_, seconds, peak = done.stdout.split()
    row = row_of(f"{MEMORY_STEPS} steps over 50,000 cached queries", BATCH_SIZE * MEMORY_STEPS, float(seconds))
    return {**row, "peak_rss_mb": int(peak)}


def unit_vectors(count: int, dimension: int) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((count, dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def row_of(what: str, queries: int, seconds: float) -> dict:
    return {"what": what, "seconds": round(seconds, 2), "queries_per_s": round(queries / seconds, 1)}


@one_line_errors("training.py")
def main() -> None:
    parser = command_parser("training.py", __doc__, "threads")
    parser.add_argument("--backbone", required=True, help="path or Hub id")
    parser.add_argument("--teacher", help="path or Hub id")
    parser.add_argument("--data", help="folder or Hub id in the BEIR layout with messages, with a train split")
    parser.add_argument("--queries", type=int, default=384, help="of an epoch (default: %(default)s)")
    parser.add_argument("--output", help="the JSON file to write")
    parser.add_argument("--memory", action="store_true", help="only the process whose memory is measured")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        return memory(arguments.backbone)
    if not (arguments.teacher and arguments.data and arguments.output):
        parser.error("--teacher, --data and --output are needed")
    rows = [memory_row(arguments.backbone)]
    with tempfile.TemporaryDirectory() as folder:
        teacher = Teacher(arguments.teacher, cache_dir=folder)
        rng = np.random.default_rng(0)
        # In the place of the vectors of single pieces, which take a minute and change no speed.
        pieces = SimpleNamespace(encode=lambda words: rng.standard_normal((len(words), teacher.dimension)))
        model = new_model(arguments.backbone, pieces, max_prompt_tokens=1024)
        rows += hidden_states(model, teacher, load_task(arguments.data, "train"), folder, arguments.queries)
        rows += ranking(teacher)
    for row in rows:
        more = "".join(f"  {value} {name.replace('_', ' ')}" for name, value in list(row.items())[3:])
        print(f"{row['what']:45} {row['seconds']:8.1f} s  {row['queries_per_s']:9.1f} queries/s{more}")
    rows = [{"peak_rss_mb": None, **row} for row in rows]
    write({"environment": environment(), "threads": arguments.threads, "rows": rows}, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
