# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Many conversations at once: `embed_query` against the bare backbone's prefill of the same tokens.

    python benchmarks/throughput.py --model outputs/best --data .cache/demo/data/synthetic \\
        --output results/bench-throughput.json

The bare backbone gets token ids, sorted, in batches; `embed_query` gets conversations, and does everything itself: template,
tokens, padding, prefill, head. It is measured in the same batches, and one at a time, its default on a processor. The ways
take turns; the best round of each counts.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.data import load_queries
from native_retrieval.loading import load_model
from native_retrieval.report import environment

BATCH_SIZE = 4  # the bare backbone's fastest on two cores, of 1 to 32; a GPU wants 32 and more


@torch.no_grad()
def prefill_bare(model, prompts: list[list[int]]) -> None:
    prompts = sorted(prompts, key=len)
    for begin in range(0, len(prompts), BATCH_SIZE):
        input_ids, mask = model.pad(prompts[begin : begin + BATCH_SIZE])
        states = model.backbone.base_model(input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        states[0, 0, 0].item()  # waits for a GPU


@one_line_errors("throughput.py")
def main() -> None:
    parser = CommandParser("throughput.py", __doc__)
    parser.add_argument("--model", required=True, help="directory or Hub id of a trained model")
    parser.add_argument("--data", required=True, help="folder or Hub id in the BEIR layout with messages")
    parser.add_argument("--conversations", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    conversations = list(load_queries(arguments.data)["messages"])
    conversations = [conversations[i % len(conversations)] for i in range(arguments.conversations)]
    prompts = [model.build_prompt(messages) for messages in conversations]
    few = slice(0, None, 8)  # are enough to see what one at a time costs
    ways = {
        "the bare backbone's prefill": (slice(None), lambda rows: prefill_bare(model, prompts[rows])),
        "embed_query, context": (
            slice(None),
            lambda rows: model.embed_query(conversations[rows], mode="context", batch_size=BATCH_SIZE),
        ),
        "embed_query, context, one at a time": (
            few,
            lambda rows: model.embed_query(conversations[rows], mode="context", batch_size=1),
        ),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _, way in ways.values():
        way(slice(0, 16))
    for _ in range(arguments.rounds):
        for name, (rows, way) in ways.items():
            begin = time.perf_counter()
            way(rows)
            best[name] = min(best[name], time.perf_counter() - begin)
    tokens = {name: sum(map(len, prompts[rows])) for name, (rows, _) in ways.items()}
    speed = {name: tokens[name] / seconds for name, seconds in best.items()}
    bare = speed["the bare backbone's prefill"]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "threads": arguments.threads,
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "conversations": len(prompts),
        "tokens": sum(map(len, prompts)),
        "rows": [
            {
                "what": name,
                "queries_per_s": round(len(prompts[rows]) / best[name], 2),
                "tokens_per_s": round(speed[name], 1),
                "of_bare": round(speed[name] / bare, 3),
            }
            for name, (rows, _) in ways.items()
        ],
    }
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    for row in result["rows"]:
        print(
            f"{row['what']:36} {row['queries_per_s']:8.1f} queries/s  {row['tokens_per_s']:8.0f} tokens/s  {row['of_bare']:.3f}"
        )


if __name__ == "__main__":
    sys.exit(main())
