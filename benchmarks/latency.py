# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
From the finished prefill to the documents, in milliseconds, each way and its parts.

    python benchmarks/latency.py --model outputs/best --index .cache/demo/index --output results/latency.json

One conversation at several lengths; the ways take turns in each round, so that whatever slows the machine down slows all
of them. Medians; the first rounds are dropped. The prompt is prefilled once a length: no way changes its cache.
"""

import argparse
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

from eval import load_model
from native_retrieval.index import DocumentIndex
from native_retrieval.report import environment
from native_retrieval.teacher import Teacher

WARM_UP = 3
TOP_K = 10
TEXT = (
    "The lighthouse stands on the northern cape and was first lit in 1874, after two ships had been lost in one winter. Its "
    "keeper lived there with his family until the lamp became electric, and the house is now a small museum of the coast. "
)
QUESTION = "When was the museum in it opened, and who runs it today?"
PARTS = ("decode", "teacher", "probe", "head", "search")
COLOURS = {"decode": "#E69F00", "teacher": "#6E6E6E", "probe": "#D55E00", "head": "#0072B2", "search": "#222222"}


def conversation_of(model, tokens: int) -> list[int]:
    """Token ids of a conversation whose prompt has exactly this many."""
    messages = [{"role": "user", "content": QUESTION}]
    while len(model.build_prompt(messages)) < tokens:
        history = [{"role": "user", "content": "Tell me more."}, {"role": "assistant", "content": TEXT * 4}]
        messages = [*history, *messages]
    ids = model.build_prompt(messages)
    return ids[:4] + ids[len(ids) - tokens + 4 :]


class Clock:
    """Milliseconds of each part of one way."""

    def __init__(self):
        self.parts: dict[str, float] = defaultdict(float)

    def time(self, part, function, *arguments):
        begin = time.perf_counter()
        result = function(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.parts[part] += 1000 * (time.perf_counter() - begin)
        return result


class Ways:
    def __init__(self, model, teacher, index):
        self.model, self.teacher, self.index = model, teacher, index

    def search(self, vector) -> None:
        self.index.search(np.asarray(vector, dtype=np.float32).reshape(1, -1), TOP_K)

    def write(self, clock, prefill):
        return clock.time("decode", self.model.write_queries, prefill)

    @torch.no_grad()
    def head(self, clock, prefill, readout_mask=None, probe_states=None):
        output = clock.time(
            "head",
            lambda: self.model(
                prefill.input_ids,
                prefill.attention_mask,
                readout_mask,
                prefill.hidden_states,
                probe_states=probe_states,
            ),
        )
        return output.query_embeddings.float().cpu().numpy()

    def generate_then_encode(self, clock, prefill):
        _, queries = self.write(clock, prefill)
        text = self.model.tokenizer.decode(queries[0]) or "."
        vector = clock.time("teacher", self.teacher.encode, [text])
        clock.time("search", self.search, vector)

    def native_generated(self, clock, prefill):
        written, queries = self.write(clock, prefill)
        mask = written.attention_mask.bool().clone()
        mask[:, : mask.shape[1] - max(1, len(queries[0]))] = False
        clock.time("search", self.search, self.head(clock, written, mask))

    def native_context(self, clock, prefill):
        clock.time("search", self.search, self.head(clock, prefill))

    @torch.no_grad()
    def native_probe(self, clock, prefill):
        states = clock.time("probe", self.model.pass_probe, prefill)
        clock.time("search", self.search, self.head(clock, prefill, probe_states=states))

    def all(self) -> dict:
        ways = {
            "generate-then-encode": self.generate_then_encode,
            "native-generated": self.native_generated,
            "native-context": self.native_context,
        }
        return ways | ({"native-probe": self.native_probe} if self.model.probe is not None else {})


def measure(ways: Ways, tokens: int, rounds: int) -> dict:
    """Medians of every way at one length."""
    model = ways.model
    ids = torch.tensor([conversation_of(model, tokens)], device=model.backbone.device)
    clock = Clock()
    for _ in range(3):
        clock.parts.clear()
        prefill = clock.time("prefill", model.prefill, ids)
    samples: dict[str, list[dict]] = defaultdict(list)
    for round_ in tqdm(range(WARM_UP + rounds), desc=f"{tokens} tokens"):
        for name, way in ways.all().items():
            one = Clock()
            way(one, prefill)
            if round_ >= WARM_UP:
                samples[name].append(dict(one.parts))
    result = {"prefill": round(clock.parts["prefill"], 1), "ways": {}}
    for name, rows in samples.items():
        parts = {part: float(np.median([row[part] for row in rows])) for part in PARTS if part in rows[0]}
        totals = [sum(row.values()) for row in rows]
        result["ways"][name] = {
            "total": {"p50": round(float(np.median(totals)), 2), "p95": round(float(np.percentile(totals, 95)), 2)},
            "parts": {part: round(value, 2) for part, value in parts.items()},
        }
    written = len(model.write_queries(prefill)[1][0])
    result["query_tokens"] = written
    baseline = result["ways"]["generate-then-encode"]["total"]["p50"]
    for way in result["ways"].values():
        way["of_generate_then_encode"] = round(way["total"]["p50"] / baseline, 4)
    return result


def draw(result: dict, path: Path) -> None:
    figure = Figure(figsize=(7.5, 1.0 + 1.35 * len(result["lengths"])), layout="constrained")
    panels = figure.subplots(len(result["lengths"]), 1, squeeze=False)[:, 0]
    for axes, (tokens, row) in zip(panels, result["lengths"].items(), strict=True):
        names = list(row["ways"])
        left = np.zeros(len(names))
        for part in PARTS:
            widths = np.array([row["ways"][name]["parts"].get(part, 0.0) for name in names])
            axes.barh(names, widths, left=left, color=COLOURS[part], label=part, height=0.7)
            left += widths
        for name, total in zip(names, left, strict=True):
            axes.annotate(f"{total:.1f} ms", (total, name), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * left.max())
        axes.set_title(f"{tokens} prompt tokens (prefill {row['prefill']:.0f} ms)", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(f"Milliseconds after the prefill, {result['dtype']}, {result['threads']} threads")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(PARTS), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub id of a trained model")
    parser.add_argument("--index", required=True, help="index directory of its teacher")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024, 4096], help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds a length (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the backbone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="the JSON file to write; a figure is drawn beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    model.backbone.to(getattr(torch, arguments.dtype))
    # Room for the turn that takes a prompt past the length it is then cut to: none may be dropped.
    model.config.max_prompt_tokens = max(arguments.lengths) + 1024
    teacher = Teacher(model.config.teacher_name_or_path, model.config.teacher_revision)
    ways = Ways(model, teacher, DocumentIndex.load(arguments.index))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "lengths": {str(tokens): measure(ways, tokens, arguments.rounds) for tokens in arguments.lengths},
    }
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, output.with_suffix(".png"))
    for tokens, row in result["lengths"].items():
        print(f"{tokens} tokens, prefill {row['prefill']:.0f} ms, a query of {row['query_tokens']} tokens")
        for name, way in row["ways"].items():
            parts = ", ".join(f"{part} {value:.1f}" for part, value in way["parts"].items())
            print(f"  {name:22} {way['total']['p50']:8.1f} ms  1/{1 / way['of_generate_then_encode']:<6.1f} ({parts})")


if __name__ == "__main__":
    main()
