# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
An agent's turn: from the user's question to the first token of the answer, which stands behind the documents.

    python benchmarks/turn.py --model outputs/best --index .cache/demo/index --output results/bench-turn.json

Ours prefills the conversation once, takes the vector, searches, and goes on in the same cache behind the documents. The
two-model pipeline writes a query, encodes it with the teacher, and then goes on in its cache in the same way: it is given
its best chance. Whole turns take turns; medians, the first round dropped. Besides: the next turn of the conversation, which
passes only what is new, against one that starts anew.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from benchmarks.latency import QUERY_TOKENS, TOP_K, conversation_of
from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.index import DocumentIndex
from native_retrieval.loading import load_model
from native_retrieval.report import environment
from native_retrieval.teacher import Teacher

NUM_DOCUMENTS = 3  # that stand before the answer
NEXT_QUESTION = "<|im_end|>\n<|im_start|>user\nAnd who was the first keeper?<|im_end|>\n<|im_start|>assistant\n"


class Turn:
    """Both ways through a turn; each returns what it found and the cache after the first token."""

    def __init__(self, model, teacher, index):
        self.model, self.teacher, self.index = model, teacher, index

    def answer(self, vectors, ids, cache) -> torch.Tensor:
        _, rows = self.index.search(np.asarray(torch.as_tensor(vectors).cpu(), dtype=np.float32), TOP_K)
        documents = "\n".join(self.index.documents[row]["text"][:400] for row in rows[0][:NUM_DOCUMENTS].tolist())
        more = self.model.tokenizer(f"<|im_end|>\n<|im_start|>tool\n{documents}", return_tensors="pt")["input_ids"]
        ids = torch.cat((ids, more.to(ids.device)), dim=1)
        return self.model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)

    def native_context(self, ids, cache=None):
        found = self.model.embed_query(ids, mode="context", past_key_values=cache, return_cache=True)
        return self.answer(found.query_embeddings.float(), ids, found.past_key_values), found.past_key_values

    def generate_then_encode(self, ids):
        prefill = self.model.prefill(ids)
        _, queries = self.model.write_queries(prefill)
        vectors = self.teacher.encode([self.model.tokenizer.decode(queries[0]) or "."])
        return self.answer(vectors, ids, prefill.past_key_values), prefill.past_key_values


def measure(turn: Turn, tokens: int, rounds: int) -> list[dict]:
    ids = torch.tensor([conversation_of(turn.model, tokens)], device=turn.model.backbone.device)
    more = turn.model.tokenizer(NEXT_QUESTION, return_tensors="pt")["input_ids"].to(ids.device)
    seconds = defaultdict(list)
    for round_ in tqdm(range(1 + rounds), desc=f"{tokens} tokens", unit="round"):
        times = {}

        def timed(name, function, *arguments, times=times):
            begin = time.perf_counter()
            result = function(*arguments)
            times[name] = time.perf_counter() - begin
            return result

        timed("generate-then-encode", turn.generate_then_encode, ids)
        answered, cache = timed("native-context", turn.native_context, ids)
        longer = torch.cat((answered, more), dim=1)
        timed("next turn, native-context", turn.native_context, longer, cache)
        if round_:  # the first round warms up, and this has nothing new in it
            timed("next turn, native-context from nothing", turn.native_context, longer)
            for name, value in times.items():
                seconds[name].append(value)
    return [
        {"history_tokens": tokens, "method": name, "first_token_ms": round(1000 * float(np.median(values)), 1)}
        for name, values in seconds.items()
    ]


def draw(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axes = figure.subplots()
    for method, colour, style in (
        ("generate-then-encode", "#6E6E6E", "-"),
        ("native-context", "#0072B2", "-"),
        ("next turn, native-context", "#0072B2", ":"),
    ):
        points = [(row["history_tokens"], row["first_token_ms"]) for row in rows if row["method"] == method]
        axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=method)
        axes.annotate(
            f"{points[-1][1]:.0f} ms", points[-1], (6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["history_tokens"] for row in rows], [str(row["history_tokens"]) for row in rows])
    axes.minorticks_off()
    axes.set_ylim(0)
    axes.set_xlabel("Tokens of history")
    axes.set_title("Milliseconds from the question to the first token of the answer", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


@one_line_errors("turn.py")
def main() -> None:
    parser = CommandParser("turn.py", __doc__)
    parser.add_argument("--model", required=True, help="directory or Hub id of a trained model")
    parser.add_argument("--index", required=True, help="index directory of its teacher")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="tokens of history")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds a length (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="the JSON file to write; a figure goes into figures/ beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, index = load_model(arguments.model), DocumentIndex.load(arguments.index)
    index.check_model(model.config)
    model.config.max_prompt_tokens = max(arguments.lengths) + 1024
    model.config.max_query_tokens = QUERY_TOKENS
    teacher = Teacher(model.config.teacher_name_or_path, model.config.teacher_revision)
    turn = Turn(model, teacher, index)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "rows": [row for tokens in arguments.lengths for row in measure(turn, tokens, arguments.rounds)],
    }
    output = Path(arguments.output)
    figures = output.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    draw(result["rows"], figures / f"{output.stem}.png")
    for row in result["rows"]:
        print(f"{row['history_tokens']:5} tokens  {row['method']:40} {row['first_token_ms']:9.1f} ms")


if __name__ == "__main__":
    sys.exit(main())
