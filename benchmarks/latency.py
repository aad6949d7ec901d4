# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
From the finished prefill to the documents, in milliseconds, each way and its parts.

    python benchmarks/latency.py --model outputs/best --index .cache/demo/index --output results/bench-latency.json

One conversation at several lengths, in bf16 and fp32; the ways take turns in each round, in a random order, so that
whatever slows the machine down slows all of them, and none always follows the same other. Medians; the first rounds
are dropped. All of a length's rounds go on from one prefill, whose cache no way changes; its own time is the median
of two. The cache knows what the copy path has read of older turns, in the teacher's tokens; the last user's turn is
read anew each time, on the head's clock. (What it takes to read all turns, as when a whole conversation arrives at
once, is "words" in the prefill's row.) Besides: one decode step; the paper's comparison, the head on the written
query's states against the teacher's encoding of the same query (its 21.8x is with a teacher of 8B); and the peak
memory of a process that serves one way and nothing else.

A model without a probe is given an untrained one, which takes as long.
"""

import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm.auto import tqdm

from configuration_native_retrieval import NativeRetrievalConfig
from modeling_native_retrieval import Probe, processor_has_bfloat16
from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.index import DocumentIndex
from native_retrieval.loading import load_model, model_folder, share_keys_among_heads
from native_retrieval.report import environment
from native_retrieval.teacher import Teacher

WARM_UP = 2
TOP_K = 10
# The longest query that is kept: on QReCC's conversations the median is 11 tokens and the mean 13, but a conversation made of
# repeated text runs on. One token more is generated, for the state of the last.
QUERY_TOKENS = 11
DTYPES = ("bfloat16", "float32")
COMPUTED = DTYPES if torch.cuda.is_available() or processor_has_bfloat16() else ("float32",)
TEXT = (
    "The lighthouse stands on the northern cape and was first lit in 1874, after two ships had been lost in one winter. Its "
    "keeper lived there with his family until the lamp became electric, and the house is now a small museum of the coast. "
)
QUESTION = "When was the museum in it opened, and who runs it today?"
WAYS = ("generate-then-encode", "native-generated", "native-context", "native-probe")
COMPARED = ("decode step", "head on the query", "teacher on the query")
PARTS = ("decode", "teacher", "probe", "head", "search")
COLOURS = {"decode": "#E69F00", "teacher": "#6E6E6E", "probe": "#D55E00", "head": "#0072B2", "search": "#222222"}


def conversation_of(model, tokens: int) -> list[int]:
    """Token ids of a conversation whose prompt has exactly this many."""
    messages = [{"role": "user", "content": QUESTION}]
    while len(model.build_prompt(messages)) < tokens:
        text = " ".join(f"{len(messages)}.{i} {TEXT}" for i in range(4))  # a turn that is there twice is read once
        messages = [{"role": "user", "content": "Tell me more."}, {"role": "assistant", "content": text}, *messages]
    ids = model.build_prompt(messages)
    return ids[:4] + ids[len(ids) - tokens + 4 :]


def with_probe(model):
    if model.probe is None:
        model.config.num_probe_tokens = 8
        model.probe = Probe(model.config, model.backbone).requires_grad_(False).eval()
        for weight in model.probe.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        model.probe.to(model.head.linear_in.weight)
        model._hook_backbone()
        share_keys_among_heads()
    return model


def load(path: str, dtype: str, lengths: list[int]):
    """The model, its head in the backbone's precision."""
    model = load_model(path)
    model.backbone.to(getattr(torch, dtype))
    if dtype == "float32":
        model.float()
    # Room for the turn that takes a prompt past the length it is then cut to: none may be dropped.
    model.config.max_prompt_tokens = max(lengths) + 1024
    model.config.max_query_tokens = QUERY_TOKENS
    return with_probe(model)


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
        self.written: tuple | None = None

    def search(self, vector) -> None:
        self.index.search(np.asarray(vector, dtype=np.float32).reshape(1, -1), TOP_K)

    def write(self, clock, prefill):
        """The same tokens for both ways that need them: written once a round, and on the clock of both."""
        if self.written is None:
            begin = Clock()
            self.written = begin.time("decode", self.model.write_queries, prefill), begin.parts["decode"]
        result, clock.parts["decode"] = self.written
        return result

    @torch.no_grad()
    def head(self, clock, prefill, cache, readout_mask=None, probe_states=None):
        # As when the last user's turn, and the header behind it, have just come.
        cache.turns = dict(list(cache.turns.items())[:-2])
        output = clock.time(
            "head",
            lambda: self.model(
                prefill.input_ids,
                prefill.attention_mask,
                readout_mask,
                prefill.hidden_states,
                self.model.words_of(prefill.input_ids, prefill.attention_mask, cache),
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
        clock.time("search", self.search, self.head(clock, written, prefill.past_key_values, mask))

    def native_context(self, clock, prefill):
        clock.time("search", self.search, self.head(clock, prefill, prefill.past_key_values))

    @torch.no_grad()
    def native_probe(self, clock, prefill):
        states = clock.time("probe", self.model.pass_probe, prefill)
        vector = self.head(clock, prefill, prefill.past_key_values, probe_states=states)
        clock.time("search", self.search, vector)

    def all(self) -> dict:
        return {name: getattr(self, name.replace("-", "_")) for name in WAYS}

    # -- what the parts are compared with -----------------------------------------------------------------------------

    @torch.no_grad()
    def decode_step(self, clock, prefill):
        """One token, as generation makes it: through the backbone and its language-model head."""
        mask = torch.nn.functional.pad(prefill.attention_mask, (0, 1), value=1)
        token, cache = prefill.input_ids[:, -1:], prefill.past_key_values.branch()
        clock.time("decode step", lambda: self.model.backbone(token, attention_mask=mask, past_key_values=cache))

    @torch.no_grad()
    def head_alone(self, clock, written, query: str, count: int):
        states = written.hidden_states[:, -count:].to(self.model.head.linear_in.weight.dtype)
        mask = written.attention_mask[:, -count:].bool()
        clock.time("head on the query", self.model.head, states, mask)
        clock.time("teacher on the query", self.teacher.encode, [query])


def measure(ways: Ways, tokens: int, dtype: str, rounds: int) -> list[dict]:
    """Rows of every way at one length: `{prompt_tokens, dtype, method, part, p50_ms, p95_ms}`."""
    model = ways.model
    ids = torch.tensor([conversation_of(model, tokens)], device=model.backbone.device)
    samples: dict[str, list[dict]] = {name: [] for name in ("prefill", *WAYS, *COMPARED)}
    for round_ in range(3):
        clock = Clock()
        prefill = clock.time("prefill", model.prefill, ids)
        clock.time("words", model.words_of, ids, torch.ones_like(ids))
        if round_:
            samples["prefill"].append({"total": clock.parts["prefill"], "words": clock.parts["words"]})
    written, queries = model.write_queries(prefill)
    query = model.tokenizer.decode(queries[0]) or "."
    shuffled = random.Random(0)
    for round_ in tqdm(range(WARM_UP + rounds), desc=f"{dtype}, {tokens} tokens", unit="round"):
        ways.written = None
        timed = [
            *ways.all().items(),
            (None, ways.decode_step),
            (None, lambda clock, _: ways.head_alone(clock, written, query, max(1, len(queries[0])))),
        ]
        # Whatever follows another way finds memory that it has left, and lacks what it has pushed out of the caches.
        shuffled.shuffle(timed)
        for name, way in timed:
            clock = Clock()
            way(clock, prefill)
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
import resource, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads({threads})
from benchmarks.latency import conversation_of, with_probe
from native_retrieval.loading import load_model
from native_retrieval.index import DocumentIndex
model = load_model({model!r})
index = DocumentIndex.load({index!r})
model.config.max_prompt_tokens = 1280  # of fewer, older turns would be dropped for ever
ids = torch.tensor([conversation_of(model, 256)], device=model.backbone.device)
if {two_models}:
    from native_retrieval.teacher import Teacher
    teacher = Teacher(model.config.teacher_name_or_path, model.config.teacher_revision)
    vectors = teacher.encode([model.tokenizer.decode(model.write_queries(model.prefill(ids))[1][0]) or "."])
else:
    if {mode!r} == "probe":
        model = with_probe(model)
    vectors = model.embed_query(ids, mode={mode!r}, return_cache=True).query_embeddings.float().cpu().numpy()
index.search(vectors, 10)
print("sentence_transformers" in sys.modules, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak_memory(arguments) -> dict[str, int]:
    """
    MiB at the peak of a fresh process that serves one way, 256 prompt tokens. It starts at the peak of the process that
    calls this: call it before loading a model.
    """
    peaks = {}
    for name, mode in (
        ("generate-then-encode", None),
        ("native-generated", "generated"),
        ("native-context", "context"),
        ("native-probe", "probe"),
    ):
        program = MEMORY.format(
            root=str(Path(__file__).resolve().parent.parent),
            threads=arguments.threads,
            model=arguments.model,
            index=arguments.index,
            two_models=mode is None,
            mode=mode,
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        teacher_loaded, peak = done.stdout.split()[-2:]
        assert (teacher_loaded == "True") == (mode is None), "a native way has loaded the embedding model"
        peaks[name] = int(peak)
    return peaks


def medians(rows: list[dict], tokens: int, dtype: str) -> dict[str, dict[str, float]]:
    """`{method: {part: ms}}` of one length."""
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if (row["prompt_tokens"], row["dtype"]) == (tokens, dtype):
            table[row["method"]][row["part"]] = row["p50_ms"]
    return table


def draw(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure  # not in the processes whose memory is measured

    lengths, dtype = list(dict.fromkeys(row["prompt_tokens"] for row in result["rows"])), result["rows"][0]["dtype"]
    figure = Figure(figsize=(7.5, 1.0 + 1.35 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), 1, squeeze=False)[:, 0]
    for axes, tokens in zip(panels, lengths, strict=True):
        table = medians(result["rows"], tokens, dtype)
        left = np.zeros(len(WAYS))
        for part in PARTS:
            widths = np.array([table[name].get(part, 0.0) for name in WAYS])
            axes.barh(WAYS, widths, left=left, color=COLOURS[part], label=part, height=0.7)
            left += widths
        for name, total in zip(WAYS, left, strict=True):
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
    parser = CommandParser("latency.py", __doc__)
    parser.add_argument("--model", required=True, help="directory or Hub id of a trained model")
    parser.add_argument("--index", required=True, help="index directory of its teacher")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024, 4096], help="prompt tokens")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds a length (default: %(default)s)")
    parser.add_argument(
        "--dtypes",
        choices=DTYPES,
        nargs="+",
        default=COMPUTED,
        help="of the model (default: those the processor has)",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="the JSON file to write; a figure goes into figures/ beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    index = DocumentIndex.load(arguments.index)
    config = NativeRetrievalConfig.from_pretrained(model_folder(arguments.model))
    index.check_model(config)
    peaks = peak_memory(arguments)
    teacher = Teacher(config.teacher_name_or_path, config.teacher_revision)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "peak_memory_mib": peaks,
        "rows": [],
    }
    for dtype in arguments.dtypes:
        ways = Ways(load(arguments.model, dtype, arguments.lengths), teacher, index)
        for tokens in arguments.lengths:
            result["rows"] += measure(ways, tokens, dtype, arguments.rounds)
    output = Path(arguments.output)
    figures = output.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, figures / f"{output.stem}.png")
    for dtype in arguments.dtypes:
        for tokens in arguments.lengths:
            table = medians(result["rows"], tokens, dtype)
            whole = table["generate-then-encode"]["total"]
            print(f"{dtype}, {tokens} prompt tokens")
            for name, parts in table.items():
                total = parts.pop("total")
                shown = ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
                print(f"  {name:22} {total:8.1f} ms  1/{whole / total:<6.1f} {shown}")
    print("peak memory:", ", ".join(f"{name} {peak} MiB" for name, peak in result["peak_memory_mib"].items()))


if __name__ == "__main__":
    sys.exit(main())
