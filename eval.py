r"""
Compares ways from a conversation to documents on one split of a data set, and says what each costs.

The first evaluation of a model that `train.py` wrote; the index is built from the data's corpus and kept for the next:

    python eval.py \
        --model outputs/qrecc \
        --data data/qrecc \
        --split test \
        --output results/qrecc-test.json

With figures, with the queries that the backbone wrote, and with an index of your own:

    python eval.py \
        --model outputs/qrecc \
        --data data/qrecc \
        --split test \
        --index indexes/qrecc \
        --output results/qrecc-test.json \
        --figures results/figures \
        --save_queries

A few methods only, without timing them:

    python eval.py \
        --model outputs/qrecc \
        --data data/qrecc \
        --split dev \
        --output results/qrecc-dev.json \
        --methods generate-then-encode native-context \
        --latency_queries 0

The methods:

    human-rewrite                  the teacher on a question that a human wrote so that it stands alone: the upper line
    last-question                  the teacher on the last user message
    full-history                   the teacher on as many of the newest turns as its context takes
    generate-then-encode           the backbone writes a query, the teacher encodes it: the baseline, two models
    generate-then-encode+question  the same, with the last question appended
    bm25-last-question             BM25 on the last user message
    bm25-full-history              BM25 on the whole conversation
    native-generated               the head on the hidden states of the query that the backbone writes: one model
    native-context                 the head on the hidden states of the prompt: one model, and no query is written
    native-probe                   besides these, a few learned tokens behind the prompt: one model, about one decode step

Milliseconds run from the finished prefill to the query vector, one query at a time. Search in the index, the same for
every vector, is left out; BM25 has no vector, so its number is the scoring of all documents.

The result (`--output`) holds every method's measures, its difference to the baseline with a 95% interval (whole
conversations resampled, 10,000 times), the latency and the rank of the first relevant document of each query. Bad input
ends in one line on stderr and exit code 2.
"""

import hashlib
import json
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from native_retrieval.cli import Parser, check_writable, nearest
from native_retrieval.methods import METHODS, Comparison

# What takes seconds to import is imported where it is used, so that --help and a mistyped flag answer at once.
if TYPE_CHECKING:
    from modeling_native_retrieval import NativeRetrievalModel
    from native_retrieval.data import Task
    from native_retrieval.index import DocumentIndex
    from native_retrieval.teacher import Teacher


@dataclass
class EvalArguments:
    model: str = field(metadata={"help": "Directory or Hub id of a model that train.py wrote."})
    data: str = field(
        metadata={"help": "Folder, or Hub id, of corpus, queries and qrels; see native_retrieval/data.py."}
    )
    output: str = field(metadata={"help": "The JSON file to write, such as results/qrecc-test.json."})
    split: str = field(default="test", metadata={"help": "The split: the name of a file in qrels/."})
    index: str | None = field(
        default=None,
        metadata={"help": "Index directory of the data's corpus; without it, one is built and kept in cache_dir."},
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "Which of the methods above to compare; all if absent."},
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Embedding model of the index, by name or path; the model's own if absent."}
    )
    batch_size: int = field(default=32, metadata={"help": "Prompts for which queries are written in one batch."})
    latency_queries: int = field(
        default=30, metadata={"help": "Queries to time, evenly spaced over the split; 0 times none."}
    )
    figures: str | None = field(
        default=None,
        metadata={
            "help": "Directory for two figures, quality by depth of the conversation and against latency, and the report's."
        },
    )
    report: str | None = field(
        default=None,
        metadata={"help": "A Markdown file to write: where the model's default mode fails, with its worst queries."},
    )
    save_queries: bool = field(
        default=False, metadata={"help": "Put the queries that the backbone wrote into the result."}
    )
    cache_dir: str = field(
        default=".cache/native_retrieval", metadata={"help": "Where the teacher's vectors and built indexes are kept."}
    )
    debug: bool = field(default=False, metadata={"help": "Show the traceback of an error."})

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(
                    f"--methods: {name!r} is unknown{nearest(name, METHODS)}; there are {', '.join(METHODS)}"
                )
        self.methods = list(dict.fromkeys(self.methods))
        if self.batch_size < 1:
            raise ValueError(f"--batch_size is {self.batch_size}, wanted at least 1")
        if self.latency_queries < 0:
            raise ValueError(f"--latency_queries is {self.latency_queries}, wanted 0 or more")
        if self.save_queries and "generate-then-encode" not in self.methods:
            raise ValueError("--save_queries needs generate-then-encode among --methods, which writes the queries")
        self.check_report(self.methods)
        if Path(self.output).suffix != ".json":
            raise ValueError(f"--output is {self.output!r}, wanted a file that ends in .json")
        for flag, file, example in (("output", self.output, "test.json"), ("report", self.report, "failures.md")):
            if file and Path(file).is_dir():
                raise ValueError(f"--{flag}: {file} is a directory; name a file in it, such as {file}/{example}")
        # Now, and not after an hour of work.
        for flag, directory in (
            ("output", Path(self.output).parent),
            ("figures", self.figures),
            ("report", Path(self.report).parent if self.report else None),
            ("cache_dir", self.cache_dir),
        ):
            if directory is not None:
                check_writable(flag, Path(directory))

    def check_report(self, methods: list[str]) -> None:
        if self.report and not (
            "generate-then-encode" in methods and any(name.startswith("native-") for name in methods)
        ):
            raise ValueError("--report needs generate-then-encode and a native mode among --methods, to compare them")


GROUPS = {
    "what to judge": ("model", "data", "split", "index", "teacher"),
    "how": ("methods", "batch_size", "latency_queries", "cache_dir", "debug"),
    "what to write": ("output", "figures", "report", "save_queries"),
}


def parse(argv: list[str]) -> EvalArguments:
    """Raises `ValueError`, in one line, for flags and values that cannot be used."""
    parser = Parser(
        EvalArguments, GROUPS, prog="eval.py", usage="%(prog)s --model ... --data ... --output ...", description=__doc__
    )
    # Before parsing: argparse would complain about the required flag that a mistyped one leaves unset.
    known = ["--help", *(f"--{argument.name}" for argument in fields(EvalArguments))]
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag.replace("-", "_") not in [name.replace("-", "_") for name in known]:
            raise ValueError(f"unknown flag {flag}{nearest(flag, known)}; python eval.py --help lists all")
    arguments, unused = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unused:
        raise ValueError(f"{unused[0]!r} belongs to no flag; python eval.py --help lists all")
    return arguments


def load_teacher(arguments: EvalArguments, model: "NativeRetrievalModel") -> "Teacher":
    from native_retrieval.teacher import teacher_of

    return teacher_of(model.config, arguments.teacher, cache_dir=arguments.cache_dir)


def open_index(directory: str, task: "Task", model: "NativeRetrievalModel") -> "DocumentIndex":
    """The index of `--index`. Raises `ValueError` if it is another teacher's, or lacks documents of the qrels."""
    from native_retrieval.index import DocumentIndex

    index = DocumentIndex.load(directory)
    index.check_model(model.config)
    judged = {document for judgements in task.qrels.values() for document, score in judgements.items() if score > 0}
    if missing := sorted(judged.difference(index.ids)):
        raise ValueError(
            f"--index: {len(missing):,} of the {len(judged):,} documents relevant in {task.name} ({task.split}) are "
            f"not in {directory}, {missing[0]!r} among them; leave --index out to build the index of this data"
        )
    return index


def cached_index(cache_dir: str, task: "Task", teacher: "Teacher") -> "DocumentIndex":
    """The index of the task's corpus, from the cache; built first if it is not there or damaged."""
    from native_retrieval.index import DocumentIndex, IndexMismatchError

    digest = hashlib.sha256(teacher.identity.encode())
    for batch in task.corpus.iter(batch_size=10_000):
        digest.update(json.dumps([batch["_id"], batch["title"], batch["text"]]).encode())
    directory = Path(cache_dir, f"index-{digest.hexdigest()[:24]}")
    if (directory / "index.json").exists():
        try:
            return DocumentIndex.load(directory)
        except (IndexMismatchError, FileNotFoundError):
            print(f"the cached index {directory} is damaged, and is built again", file=sys.stderr)
    vectors = teacher.documents(task.corpus)
    return DocumentIndex.build(
        task.corpus, vectors, teacher.fingerprint, teacher.name_or_path, directory, overwrite=True
    )


def choose_methods(methods: list[str], task: "Task", model: "NativeRetrievalModel") -> list[str]:
    """Without human-rewrite unless every query has a rewrite, and without native-probe if the model has no probe."""
    lacking = sum(not rewrite.strip() for rewrite in task.queries["rewrite"])
    notes = {}
    if lacking:
        notes["human-rewrite"] = f"{lacking:,} of the {len(task.queries):,} queries have no rewrite"
    if model.probe is None:
        notes["native-probe"] = "the model has no probe"
    for name in [name for name in notes if name in methods]:
        methods = [other for other in methods if other != name]
        note = f"{name} is left out: {notes[name]}"
        if not methods:
            raise ValueError(f"{note}, and no other method is asked for")
        print(note, file=sys.stderr)
    return methods


def evaluate(arguments: EvalArguments, command: str) -> dict[str, Any]:
    """Runs the comparison, writes the result, as `report.build_result` makes it, and the page on its failures; returns it."""
    from transformers.utils import logging

    from native_retrieval.data import load_task
    from native_retrieval.loading import load_model

    logging.set_verbosity_error()
    task = load_task(arguments.data, arguments.split)
    if len(task.queries) < 2:
        raise ValueError(f"{arguments.data}, split {arguments.split!r}: {len(task.queries)} queries, wanted at least 2")
    model = load_model(arguments.model)
    methods = choose_methods(arguments.methods, task, model)
    arguments.check_report(methods)
    # Opened before the teacher is loaded, which can take long.
    index = open_index(arguments.index, task, model) if arguments.index else None
    teacher = load_teacher(arguments, model)
    if index is None:
        index = cached_index(arguments.cache_dir, task, teacher)

    from native_retrieval.report import build_result, write_json

    comparison = Comparison(model, teacher, index, task.queries, methods, arguments.batch_size)
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
        comparison.latencies(arguments.latency_queries),
    )
    result["environment"]["device"] = _device_name(model)
    result["environment"]["dtype"] = str(model.backbone.dtype).removeprefix("torch.")
    if arguments.save_queries:
        result["methods"]["generate-then-encode"]["queries"] = comparison.written.queries
    write_json(result, arguments.output)  # before the page, which takes memory on a large corpus
    if arguments.report:
        from native_retrieval.failures import write_failure_report

        name = f"{Path(arguments.output).stem}-failures.png"
        figure = Path(arguments.figures, name) if arguments.figures else None
        for path in write_failure_report(arguments.report, result, runs, task, comparison, figure=figure):
            print(f"Written: {path}")
    return result


def _device_name(model: "NativeRetrievalModel") -> str:
    import torch

    device = model.backbone.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = parse(argv)
        result = evaluate(arguments, shlex.join(["python", "eval.py", *argv]))
        show(arguments, result)
    except (ValueError, OSError) as error:
        if "--debug" in argv:
            raise
        print(f"eval.py: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def show(arguments: EvalArguments, result: dict[str, Any]) -> None:
    from native_retrieval.report import plot_by_turn, plot_quality_latency, print_table

    print_table(result)
    if arguments.latency_queries:
        print(
            f"Milliseconds from the finished prefill to the query vector, one query at a time, over "
            f"{min(arguments.latency_queries, result['num_queries'])} queries; the index search, the same for all "
            "vectors, is left out, and BM25's number is its scoring."
        )
    print(f"Written: {arguments.output}")
    if arguments.figures:
        folder, stem = Path(arguments.figures), Path(arguments.output).stem
        folder.mkdir(parents=True, exist_ok=True)
        plot_by_turn(result, folder / f"{stem}-by-turn.png")
        print(f"Written: {folder / f'{stem}-by-turn.png'}")
        if arguments.latency_queries:
            plot_quality_latency(result, folder / f"{stem}-quality-latency.png")
            print(f"Written: {folder / f'{stem}-quality-latency.png'}")


def _one_line(error: Exception) -> str:
    from native_retrieval.data import DataError

    # Of data one line, or one for each bad row.
    return str(error) if isinstance(error, DataError) else " ".join(str(error).split())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("eval.py: interrupted; what the teacher has encoded is kept")
