# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Latency of a query, from the end of the prefill to the documents, in milliseconds, by method and by part.

    python benchmarks/latency.py --model outputs/best --index .cache/demo/index --output results/bench-latency.json

One conversation at several lengths, in bfloat16 and float32. The methods run in each round, in a random order, so that
whatever slows the machine down slows all of them; the first rounds are dropped, and medians reported. All rounds of a length
start from one prefill, whose cache no method changes. The copy path has read the older turns before, as in a conversation:
the user's last turn is read each time, on the head's clock ("words" in the prefill's row is the time for all turns).

For comparison: one decode step; the head on the states of the written query against the teacher on the same query, as in the
paper (its 21.8x is with a teacher of 8B); and the peak memory of a process that serves one method and nothing else.
"""

import copy
import random
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.common import parser as command_parser
from benchmarks.common import prompt_of, teacher_for, write
from configuration_native_retrieval import NativeRetrievalConfig
from native_retrieval.cli import one_line_errors
from native_retrieval.index import DocumentIndex
from native_retrieval.loading import float32_is_faster, load_model, model_folder
from native_retrieval.results import environment

WARM_UP = 2
TOP_K = 10
# The longest query that is kept. On QReCC's conversations the median is 11 tokens, but one made of repeated text runs on.
QUERY_TOKENS = 11
DTYPES = ("bfloat16", "float32")
COMPUTED = ("float32",) if float32_is_faster() else DTYPES
METHODS = ("generate-then-encode", "native-generated", "native-context")
COMPARED = ("decode step", "head on the query", "teacher on the query")
PARTS = {"decode": "#E69F00", "teacher": "#6E6E6E", "head": "#0072B2", "search": "#222222"}


def load(path: str, dtype: str, lengths: list[int]):
    model = load_model(path)
    model.backbone.to(getattr(torch, dtype))
    # Room for the turn after the longest prompt: none may be dropped.
    model.processor.max_prompt_tokens = max(lengths) + 1024
    model.config.max_query_tokens = QUERY_TOKENS
    return model


class Clock:
    """Milliseconds of each part of one method."""

    def __init__(self):
        self.parts: dict[str, float] = defaultdict(float)

    def time(self, part, function, *arguments):
        begin = time.perf_counter()
        result = function(*arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.parts[part] += 1000 * (time.perf_counter() - begin)
        return result


class Methods:
    """The methods, on one prefill."""

    def __init__(self, model, teacher, index, prefill):
        self.model, self.teacher, self.index, self.prefill = model, teacher, index, prefill
        self.known: dict = {}
        model.processor.read_words(prefill.input_ids, prefill.attention_mask, self.known)
        self.start_round()

    def start_round(self) -> None:
        self._written: tuple | None = None

    def write(self, clock):
        """The query, written once a round, and on the clock of both methods that need it."""
        if self._written is None:
            begin = Clock()
            self._written = begin.time("decode", self.model.write_queries, self.prefill), begin.parts["decode"]
        result, clock.parts["decode"] = self._written
        return result

    def search(self, clock, vector) -> None:
        vector = np.asarray(torch.as_tensor(vector).cpu(), dtype=np.float32).reshape(1, -1)
        clock.time("search", self.index.search, vector, TOP_K)

    @torch.no_grad()
    def head(self, cache, readout_mask=None) -> torch.Tensor:
        # As when the user's last turn, and the header of the answer, have just come.
        known = dict(list(self.known.items())[:-2])
        words = self.model.processor.read_words(cache.input_ids, cache.attention_mask, known)
        output = self.model(cache.input_ids, cache.attention_mask, readout_mask, cache.hidden_states, words)
        return output.query_embeddings.float()

    def generate_then_encode(self, clock) -> None:
        _, queries = self.write(clock)
        text = self.model.tokenizer.decode(queries[0]) or "."
        self.search(clock, clock.time("teacher", self.teacher.encode, [text]))

    def native_generated(self, clock) -> None:
        written, queries = self.write(clock)
        mask = written.attention_mask.bool().clone()
        mask[:, : mask.shape[1] - max(1, len(queries[0]))] = False
        self.search(clock, clock.time("head", self.head, written, mask))

    def native_context(self, clock) -> None:
        self.search(clock, clock.time("head", self.head, self.prefill))

    # -- for comparison -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode_step(self, clock) -> None:
        """One token, as generation makes it: through the backbone and its language-model head."""
        mask = torch.nn.functional.pad(self.prefill.attention_mask, (0, 1), value=1)
        step = partial(
            self.model.backbone, attention_mask=mask, past_key_values=copy.deepcopy(self.prefill.past_key_values)
        )
        clock.time("decode step", step, self.prefill.input_ids[:, -1:])

    @torch.no_grad()
    def query_alone(self, written, query: list[int], clock) -> None:
        """The head and the teacher on the same written query."""
        count = max(1, len(query))
        states, mask = written.hidden_states[:, -count:], written.attention_mask[:, -count:].bool()
        if self.model.query_head.projection is not None:
            clock.time("head on the query", self.model.query_head.projection, states, mask)
        clock.time("teacher on the query", self.teacher.encode, [self.model.tokenizer.decode(query) or "."])


def measure(model, teacher, index, tokens: int, dtype: str, rounds: int) -> list[dict]:
    """Rows of every method at one length: `{prompt_tokens, dtype, method, part, p50_ms, p95_ms}`."""
    ids = torch.tensor([prompt_of(model.processor, tokens)])
    samples: dict[str, list[dict]] = defaultdict(list)
    for round_ in range(3):
        clock = Clock()
        prefill = clock.time("prefill", model.prefill, ids)
        clock.time("words", model.processor.read_words, ids, torch.ones_like(ids))
        if round_:
            samples["prefill"].append({"total": clock.parts["prefill"], "words": clock.parts["words"]})
    methods = Methods(model, teacher, index, prefill)
    written, (query,) = model.write_queries(prefill)
    timed = [(name, getattr(methods, name.replace("-", "_"))) for name in METHODS]
    timed += [(None, methods.decode_step), (None, partial(methods.query_alone, written, query))]
    samples |= {name: [] for name in (*METHODS, *COMPARED)}  # the order of the rows
    shuffled = random.Random(0)
    for round_ in tqdm(range(WARM_UP + rounds), desc=f"{dtype}, {tokens} tokens", unit="round"):
        methods.start_round()
        # A method finds memory that the one before has left, and lacks what it has pushed out of the caches.
        for name, method in shuffled.sample(timed, len(timed)):
            clock = Clock()
            method(clock)
            if round_ < WARM_UP:
                continue
            if name:
                samples[name].append({"total": sum(clock.parts.values()), **clock.parts})
            else:
                for part, value in clock.parts.items():
                    samples[part].append({"total": value})
    rows = []
    for method, ones in samples.items():
        for part in ones[0]:
            p50, p95 = np.percentile([one[part] for one in ones], (50, 95)).round(3).tolist()
            rows.append(
                {"prompt_tokens": tokens, "dtype": dtype, "method": method, "part": part, "p50_ms": p50, "p95_ms": p95}
            )
    return rows


MEMORY = """
import resource, sys, torch
torch.set_num_threads({threads})
from benchmarks.common import prompt_of, teacher_for
from native_retrieval.index import DocumentIndex
from native_retrieval.loading import load_model
model, index = load_model({model!r}), DocumentIndex.load({index!r})
ids = torch.tensor([prompt_of(model.processor, 256)])
if {mode!r}:
    vectors = model.embed_query(ids, mode={mode!r}, return_cache=True).query_embeddings.float().cpu().numpy()
else:
        _, (query,) = model.write_queries(model.prefill(ids))
    vectors = teacher_for(model.config, {model!r}).encode([model.tokenizer.decode(query) or "."])
index.search(vectors, 10)
print("sentence_transformers" in sys.modules, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_memory(arguments) -> dict[str, int]:
    """
    MiB at the peak of a new process that serves one method, at 256 prompt tokens. It starts at the peak of the process that
    calls this: call it before loading a model.
    """
    peaks = {}
    for name, mode in zip(METHODS, ("", "generated", "context"), strict=True):
        names = {"threads": arguments.threads, "model": arguments.model, "index": arguments.index}
        program = MEMORY.format(mode=mode, **names)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        teacher_loaded, peak = done.stdout.split()[-2:]
        assert (teacher_loaded == "True") == (not mode), "a native method has loaded the embedding model"
        peaks[name] = int(peak)
    return peaks


def medians(rows: list[dict], tokens: int, dtype: str) -> dict[str, dict[str, float]]:
    """`{method: {part: ms}}` at one length."""
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if (row["prompt_tokens"], row["dtype"]) == (tokens, dtype):
            table[row["method"]][row["part"]] = row["p50_ms"]
    return table


def draw(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure  # not in the processes whose memory is measured

    lengths, dtype = list(dict.fromkeys(row["prompt_tokens"] for row in result["rows"])), result["rows"][0]["dtype"]
    figure = Figure(figsize=(7.5, 0.9 + 1.15 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), 1, squeeze=False)[:, 0]
    for axes, tokens in zip(panels, lengths, strict=True):
        table = medians(result["rows"], tokens, dtype)
        left = np.zeros(len(METHODS))
        for part, colour in PARTS.items():
            widths = np.array([table[name].get(part, 0.0) for name in METHODS])
            axes.barh(METHODS, widths, left=left, color=colour, label=part, height=0.7)
            left += widths
        for name, total in zip(METHODS, left, strict=True):
            axes.annotate(f"{total:.1f} ms", (total, name), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * left.max())
        axes.set_title(f"{tokens} prompt tokens (prefill {table['prefill']['total']:.0f} ms)", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel(f"Milliseconds after the prefill, {dtype}, {result['threads']} threads")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(PARTS), frameon=False)
    figure.savefig(path, dpi=150)


@one_line_errors("latency.py")
def main() -> None:
    parser = command_parser("latency.py", __doc__, "model", "index", "threads", "output")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024, 4096], help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds a length (default: %(default)s)")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=COMPUTED, help="(default: the processor's)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    index = DocumentIndex.load(arguments.index)
    config = NativeRetrievalConfig.from_pretrained(model_folder(arguments.model))
    index.check_model(config)
    peaks = peak_memory(arguments)
    teacher = teacher_for(config, arguments.model)
    rows = []
    for dtype in arguments.dtypes:
        model = load(arguments.model, dtype, arguments.lengths)
        for tokens in arguments.lengths:
            rows += measure(model, teacher, index, tokens, dtype, arguments.rounds)
            table = medians(rows, tokens, dtype)
            whole = table["generate-then-encode"]["total"]
            print(f"{dtype}, {tokens} prompt tokens")
            for name, parts in table.items():
                total = parts.pop("total")
                shown = ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
                print(f"  {name:22} {total:8.1f} ms  1/{whole / total:<6.1f} {shown}", flush=True)
    print("peak memory:", ", ".join(f"{name} {peak} MiB" for name, peak in peaks.items()))
    sizes = {"threads": arguments.threads, "rounds": arguments.rounds, "peak_memory_mib": peaks}
    write({"environment": environment(), **sizes, "rows": rows}, arguments.output, draw)


if __name__ == "__main__":
    sys.exit(main())
