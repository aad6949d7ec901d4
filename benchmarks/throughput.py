# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Many conversations at once: `embed_query` against the bare backbone's prefill of the same tokens.

    python benchmarks/throughput.py --model outputs/best --data .cache/demo/data/synthetic \\
        --output results/bench-throughput.json

The bare backbone gets token ids, sorted by length, in batches. `embed_query` gets conversations, in the same batches, and
one at a time, which is its default on a CPU.
"""

import sys
import time

import torch

from benchmarks.common import parser as command_parser
from benchmarks.common import write
from native_retrieval.cli import one_line_errors
from native_retrieval.data import load_queries
from native_retrieval.loading import load_model
from native_retrieval.results import environment

BATCH_SIZE = 4  # the bare backbone's fastest on two cores, of 1 to 32; a GPU wants 32 and more


@torch.no_grad()
def prefill_bare(model, prompts: list[list[int]]) -> None:
    prompts = sorted(prompts, key=len)
    for begin in range(0, len(prompts), BATCH_SIZE):
        batch = model.processor.pad(prompts[begin : begin + BATCH_SIZE])
        input_ids, mask = (part.to(model.backbone.device) for part in batch)
        states = model.backbone.base_model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        states[0, 0, 0].item()  # waits for a GPU


@one_line_errors("throughput.py")
def main() -> None:
    parser = command_parser("throughput.py", __doc__, "model", "threads", "output")
    parser.add_argument("--data", required=True, help="folder or Hub id in the BEIR layout with messages")
    parser.add_argument("--conversations", type=int, default=1000, help="(default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    conversations = list(load_queries(arguments.data)["messages"])
    conversations = [conversations[i % len(conversations)] for i in range(arguments.conversations)]
    prompts = [model.processor.encode(messages) for messages in conversations]
    every, few = slice(None), slice(0, None, 8)  # few are enough to see what one at a time costs

    def embed(rows: slice, batch_size: int) -> None:
        model.embed_query(conversations[rows], mode="context", batch_size=batch_size)

    methods = {
        "the bare backbone's prefill": (every, lambda rows: prefill_bare(model, prompts[rows])),
        "embed_query, context": (every, lambda rows: embed(rows, BATCH_SIZE)),
        "embed_query, context, one at a time": (few, lambda rows: embed(rows, 1)),
    }
    rows = []
    for name, (part, method) in methods.items():
        method(slice(0, 16))
        begin = time.perf_counter()
        method(part)
        seconds = time.perf_counter() - begin
        tokens_per_s = sum(map(len, prompts[part])) / seconds
        row = {"what": name, "queries_per_s": round(len(prompts[part]) / seconds, 2)}
        rows.append({**row, "tokens_per_s": round(tokens_per_s, 1)})
    for row in rows:
        row["of_bare"] = round(row["tokens_per_s"] / rows[0]["tokens_per_s"], 3)
        print("{what:36} {queries_per_s:8.1f} queries/s  {tokens_per_s:8.0f} tokens/s  {of_bare:.3f}".format(**row))
    result = {
        "environment": environment(),
        "threads": arguments.threads,
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "conversations": len(prompts),
        "tokens": sum(map(len, prompts)),
        "rows": rows,
    }
    write(result, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
