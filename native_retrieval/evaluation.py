"""The evaluation of a model on one task: its documents' index, the methods, their runs and the result."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .data import Task
from .index import DocumentIndex, IndexMismatchError
from .methods import METHODS, SELECTING, Comparison
from .metrics import Run
from .results import build_result
from .teacher import Teacher

if TYPE_CHECKING:
    from modeling_native_retrieval import NativeRetrievalModel


def evaluate(
    model: "NativeRetrievalModel",
    teacher: Teacher,
    index: DocumentIndex,
    task: Task,
    methods: Sequence[str] = METHODS,
    *,
    batch_size: int = 32,
    latency_queries: int = 0,
    command: str = "",
) -> tuple[dict[str, Any], dict[str, Run], Comparison]:
    """
    Compares methods on the queries of a task.

    Args:
        model: in eval mode, on its device.
        teacher, index: of the same vector space as the model.
        batch_size: prompts in one batch of the backbone.
        latency_queries: how many queries to time.
        command: the command line that gives this result again.

    Returns:
        The result, as `results.build_result` describes it; the run of each method; and the comparison.
    """
    comparison = Comparison(model, teacher, index, task.queries, methods, batch_size)
    runs = comparison.runs()
    result = build_result(
        task.name,
        task.split,
        comparison.query_ids,
        list(task.queries["turn"]),
        list(task.queries["conv"]),
        len(index),
        command,
        runs,
        task.qrels,
        comparison.latencies(latency_queries),
    )
    device = model.backbone.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result["environment"] |= {"device": name, "dtype": str(model.backbone.dtype).removeprefix("torch.")}
    return result, runs, comparison


def usable_methods(methods: Sequence[str], task: Task, model: "NativeRetrievalModel") -> list[str]:
    """
    The methods without human-rewrite if a query has no rewrite, and without those on selected words if the model selects
    none, which is said on stderr. Raises `ValueError` if none is left.
    """
    lacking, notes = sum(not rewrite.strip() for rewrite in task.queries["rewrite"]), {}
    if lacking:
        notes["human-rewrite"] = f"{lacking:,} of the {len(task.queries):,} queries have no rewrite"
    if model.query_head.selection is None:
        notes |= dict.fromkeys(SELECTING, "the model selects no words")
    left_out = [f"{name} is left out: {notes[name]}" for name in methods if name in notes]
    rest = [name for name in methods if name not in notes]
    if not rest:
        raise ValueError(f"{'; '.join(left_out)}, and --methods names no other method")
    for note in left_out:
        print(note, file=sys.stderr)
    return rest


def open_index(directory: str | os.PathLike[str], task: Task, config: Any) -> DocumentIndex:
    """An index that exists. Raises `ValueError` if it is another teacher's or lacks relevant documents of the task."""
    index = DocumentIndex.load(directory)
    index.check_model(config)
    relevant = {document for judged in task.qrels.values() for document, score in judged.items() if score > 0}
    if missing := sorted(relevant.difference(index.ids)):
        raise ValueError(
            f"--index: {len(missing):,} of the {len(relevant):,} documents relevant in {task.name} ({task.split}) are "
            f"not in {directory}, {missing[0]!r} among them; leave --index out to build the index of this data"
        )
    return index


def cached_index(cache_dir: str | os.PathLike[str], task: Task, teacher: Teacher) -> DocumentIndex:
    """The index of the task's corpus from the cache; it is built if it is missing or damaged."""
    digest = hashlib.sha256(teacher.identity.encode())
    for batch in task.corpus.iter(batch_size=10_000):
        digest.update(json.dumps([batch["_id"], batch["title"], batch["text"]]).encode())
    directory = Path(cache_dir, f"index-{digest.hexdigest()[:24]}")
    if (directory / "index.json").exists():
        try:
            return DocumentIndex.load(directory)
        except (IndexMismatchError, FileNotFoundError):
            print(f"the cached index {directory} is damaged and is built again", file=sys.stderr)
    vectors = teacher.documents(task.corpus)
    return DocumentIndex.build(
        task.corpus, vectors, teacher.fingerprint, teacher.name_or_path, directory, overwrite=True
    )
