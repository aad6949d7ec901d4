"""The arguments of `eval.py`, and their checks."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from .cli import Parser, check_writable, nearest
from .methods import METHODS
from .names import check_model_name


@dataclass
class EvalArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a model that train.py wrote."})
    data: str = field(metadata={"help": "Folder or Hub id of corpus, queries and qrels; see native_retrieval/data.py."})
    output: str = field(metadata={"help": "The JSON file to write, such as results/qrecc-test.json."})
    split: str = field(default="test", metadata={"help": "The split: the name of a file in qrels/."})
    index: str | None = field(
        default=None, metadata={"help": "Folder of the corpus's index; by default it is built and kept in cache_dir."}
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "Which of the methods above to compare (default: all)."},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Name or path of the index's embedding model (default: the model's own teacher)."},
    )
    batch_size: int = field(default=32, metadata={"help": "Prompts in one batch of the backbone."})
    latency_queries: int = field(
        default=30, metadata={"help": "Number of queries to time, evenly spaced over the split; 0 for none."}
    )
    figures: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the figures: quality by depth of the conversation, quality by latency, failures."
        },
    )
    report: str | None = field(
        default=None,
        metadata={"help": "A Markdown file to write: where the native mode fails, with its worst queries."},
    )
    save_queries: bool = field(
        default=False, metadata={"help": "Add the queries that the backbone wrote to the result."}
    )
    cache_dir: str = field(
        default=".cache/native_retrieval", metadata={"help": "Folder for the teacher's vectors and the built indexes."}
    )
    debug: bool = field(default=False, metadata={"help": "Show the traceback of an error."})

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"--methods: {name!r} is unknown{nearest(name, METHODS)}; use {', '.join(METHODS)}")
        self.methods = list(dict.fromkeys(self.methods))
        check_model_name(self.model)
        if self.batch_size < 1:
            raise ValueError(f"--batch_size is {self.batch_size}, wanted at least 1")
        if self.latency_queries < 0:
            raise ValueError(f"--latency_queries is {self.latency_queries}, wanted 0 or more")
        if self.save_queries and "generate-then-encode" not in self.methods:
            raise ValueError("--save_queries needs generate-then-encode in --methods, which writes the queries")
        self.check_report(self.methods)
        if Path(self.output).suffix != ".json":
            raise ValueError(f"--output is {self.output!r}, wanted a file that ends in .json")
        for flag, file, example in (("output", self.output, "test.json"), ("report", self.report, "failures.md")):
            if file and Path(file).is_dir():
                raise ValueError(f"--{flag}: {file} is a directory; name a file in it, such as {file}/{example}")
            if file:  # before an hour of work
                check_writable(flag, Path(file).parent)
        for flag, folder in (("figures", self.figures), ("cache_dir", self.cache_dir)):
            if folder:
                check_writable(flag, Path(folder))

    def check_report(self, methods: list[str]) -> None:
        native = any(name.startswith("native-") for name in methods)
        if self.report and not (native and "generate-then-encode" in methods):
            raise ValueError("--report compares generate-then-encode and a native mode; add both to --methods")


GROUPS = {
    "what to evaluate": ("model", "data", "split", "index", "teacher"),
    "how": ("methods", "batch_size", "latency_queries", "cache_dir", "debug"),
    "what to write": ("output", "figures", "report", "save_queries"),
}


def parse(argv: list[str], description: str | None = None) -> EvalArguments:
    """Reads the command line. Raises `ValueError`, in one line, for unknown flags and values that cannot be used."""
    usage = "%(prog)s --model ... --data ... --output ..."
    parser = Parser(EvalArguments, GROUPS, prog="eval.py", usage=usage, description=description)
    # Before parsing: argparse would only report the required flag that a mistyped one leaves unset.
    known = ["--help", *(f"--{argument.name}" for argument in fields(EvalArguments))]
    for flag in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if flag.replace("-", "_") not in [name.replace("-", "_") for name in known]:
            raise ValueError(f"unknown flag {flag}{nearest(flag, known)}; python eval.py --help lists all")
    arguments, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        raise ValueError(f"{rest[0]!r} belongs to no flag; python eval.py --help lists all")
    return arguments
