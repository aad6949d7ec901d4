# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
An agent's turn: from the user's question to the first token of the answer, which follows the documents.

    python benchmarks/turn.py --model outputs/best --index .cache/demo/index --output results/bench-turn.json

Ours prefills the conversation once, takes the vector, searches, appends the documents, and goes on in the same cache. The
two-model pipeline writes a query, encodes it with the teacher, and then goes on in its cache in the same way: this is the
fastest it can be. The two alternate; medians, without the first round. Also measured: the next turn of the conversation,
which passes only the new tokens, against the same turn without a cache.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.common import parser as command_parser
from benchmarks.common import plot, prompt_of, teacher_for, write
from benchmarks.latency import QUERY_TOKENS, TOP_K
from native_retrieval.cli import one_line_errors
from native_retrieval.index import DocumentIndex
from native_retrieval.loading import load_model
from native_retrieval.results import environment

NUM_DOCUMENTS = 3  # before the answer
NEXT_QUESTION = "<|im_end|>\n<|im_start|>user\nAnd who was the first keeper?<|im_end|>\n<|im_start|>assistant\n"
STYLES = {
    "generate-then-encode": ("#6E6E6E", "-"),
    "native-context": ("#0072B2", "-"),
    "next turn, native-context": ("#0072B2", ":"),
}


class Turn:
    """Both methods through a turn; each returns the tokens after the answer's first one, and the cache."""

    def __init__(self, model, teacher, index):
        self.model, self.teacher, self.index = model, teacher, index

    def answer(self, vectors, ids, cache) -> tuple:
        _, rows = self.index.search(np.asarray(torch.as_tensor(vectors).cpu(), dtype=np.float32), TOP_K)
        documents = "\n".join(self.index.documents[row]["text"][:400] for row in rows[0][:NUM_DOCUMENTS].tolist())
        more = self.model.tokenizer(f"<|im_end|>\n<|im_start|>tool\n{documents}", return_tensors="pt")["input_ids"]
        ids = torch.cat((ids, more), dim=1).to(self.model.backbone.device)
        return self.model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False).cpu(), cache

    def native_context(self, ids, cache=None) -> tuple:
        found = self.model.embed_query(ids, mode="context", past_key_values=cache, return_cache=True)
        return self.answer(found.query_embeddings.float(), ids, found.past_key_values)

    def generate_then_encode(self, ids) -> tuple:
        cache = self.model.prefill(ids)
        _, (query,) = self.model.write_queries(cache)
        return self.answer(self.teacher.encode([self.model.tokenizer.decode(query) or "."]), ids, cache)


def measure(turn: Turn, tokens: int, rounds: int) -> list[dict]:
    ids = torch.tensor([prompt_of(turn.model.processor, tokens)])
    more = turn.model.tokenizer(NEXT_QUESTION, return_tensors="pt")["input_ids"]
    times = defaultdict(list)

    def timed(name, function, *arguments):
        begin = time.perf_counter()
        result = function(*arguments)
        times[name].append(1000 * (time.perf_counter() - begin))
        return result

    for round_ in tqdm(range(1 + rounds), desc=f"{tokens} tokens", unit="round"):
        timed("generate-then-encode", turn.generate_then_encode, ids)
        answered, cache = timed("native-context", turn.native_context, ids)
        longer = torch.cat((answered, more), dim=1)
        timed("next turn, native-context", turn.native_context, longer, cache)
        if round_:  # nothing in it has to warm up
            timed("next turn, native-context without a cache", turn.native_context, longer)
    return [
        {"history_tokens": tokens, "method": name, "first_token_ms": round(float(np.median(values[-rounds:])), 1)}
        for name, values in times.items()
    ]


def draw(result: dict, path: Path) -> None:
    title = "Milliseconds from the question to the first token of the answer"
    with plot(path, title, "Tokens of history") as axes:
        for method, (colour, style) in STYLES.items():
            points = [
                (row["history_tokens"], row["first_token_ms"]) for row in result["rows"] if row["method"] == method
            ]
            axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=method)
            text = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{points[-1][1]:.0f} ms", points[-1], **text)
        axes.set_xscale("log", base=2)
        lengths = sorted({row["history_tokens"] for row in result["rows"]})
        axes.set_xticks(lengths, lengths)
        axes.minorticks_off()
        axes.set_ylim(0)


@one_line_errors("turn.py")
def main() -> None:
    parser = command_parser("turn.py", __doc__, "model", "index", "threads", "output")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="tokens of history")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds a length (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, index = load_model(arguments.model), DocumentIndex.load(arguments.index)
    index.check_model(model.config)
    model.processor.max_prompt_tokens = max(arguments.lengths) + 1024
    model.config.max_query_tokens = QUERY_TOKENS
    turn = Turn(model, teacher_for(model.config, arguments.model), index)
    rows = [row for tokens in arguments.lengths for row in measure(turn, tokens, arguments.rounds)]
    for row in rows:
        print(f"{row['history_tokens']:5} tokens  {row['method']:42} {row['first_token_ms']:9.1f} ms")
    sizes = {"threads": arguments.threads, "rounds": arguments.rounds}
    write({"environment": environment(), **sizes, "rows": rows}, arguments.output, draw)


if __name__ == "__main__":
    sys.exit(main())
