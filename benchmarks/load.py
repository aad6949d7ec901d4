# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Many requests from many threads: is every vector right, and does memory grow?

    python benchmarks/load.py --model outputs/best --queries data/handwritten/queries.jsonl --output results/load.json

Threads share one model and call `embed_query`, half of the calls with a cache that is dropped at once. Each vector is
compared with the conversation's vector when it is alone. The curve is the process's resident memory.
"""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from tqdm.auto import tqdm

from benchmarks.common import parser as command_parser
from benchmarks.common import plot, write
from native_retrieval.cli import one_line_errors
from native_retrieval.data import read_conversations
from native_retrieval.loading import load_model

WRONG_BELOW = 0.9999  # cosine
LOOK_EVERY = 100  # requests between two looks at the memory


def growth(rows: list[dict]) -> int:
    """Megabytes of the second half's peak over the first's."""
    half = len(rows) // 2
    return max(row["rss_mb"] for row in rows[half:]) - max(row["rss_mb"] for row in rows[:half])


def draw(result: dict, path: Path) -> None:
    with plot(path, "Resident memory (MB)", f"{result['what']}, {result['at_once']} at once") as axes:
        axes.plot(*zip(*((row["requests"], row["rss_mb"]) for row in result["rows"]), strict=True), color="#0072B2")
        axes.set_ylim(0, 1.2 * max(row["rss_mb"] for row in result["rows"]))


@one_line_errors("load.py")
def main() -> None:
    parser = command_parser("load.py", __doc__, "model", "queries", "output")
    parser.add_argument("--requests", type=int, default=5000, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="that send them (default: %(default)s)")
    arguments = parser.parse_args()

    # Not above: serving.py uses this file, and vLLM's environment lacks what it imports.
    from native_retrieval.results import environment

    model = load_model(arguments.model)
    conversations = read_conversations(Path(arguments.queries))
    conversations = sorted(conversations, key=lambda messages: len(str(messages)))[:64]
    alone = model.embed_query(conversations)
    process, lock = psutil.Process(), threading.Lock()
    rows, wrong, done = [{"requests": 0, "rss_mb": process.memory_info().rss // 10**6}], [], 0
    bar = tqdm(total=arguments.requests, unit="request")

    def request(number: int) -> None:
        nonlocal done
        row = number % len(conversations)
        if number % 2:
            vector = model.embed_query(conversations[row], return_cache=True).query_embeddings[0].float().cpu()
        else:
            vector = model.embed_query(conversations[row])[0]
        with lock:
            done += 1
            if torch.cosine_similarity(vector, alone[row], dim=0) < WRONG_BELOW:
                wrong.append(number)
            if done % LOOK_EVERY == 0:
                rows.append({"requests": done, "rss_mb": process.memory_info().rss // 10**6})
            bar.update()

    with ThreadPoolExecutor(arguments.threads) as pool:
        list(pool.map(request, range(arguments.requests)))
    bar.close()
    result = {
        "environment": environment(),
        "what": "embed_query requests",
        "at_once": arguments.threads,
        "requests": done,
        "wrong": len(wrong),
        "growth_mb_second_half": growth(rows),
        "rows": rows,
    }
    write(result, arguments.output, draw)
    print(
        f"{done:,} requests from {arguments.threads} threads: {len(wrong)} wrong vectors; the second half's peak memory is "
        f"{result['growth_mb_second_half']} MB over the first's"
    )


if __name__ == "__main__":
    sys.exit(main())
