"""The result of an evaluation: the JSON file, its table on the terminal and in Markdown, and pages with such tables.

    # fill the tables of a page from the JSON files in its folder
    python -m native_retrieval.results results/README.md

In the page, each table is between two comments; the command replaces it:

    <!-- table: NAME.json METHOD ... --> ... <!-- end -->                   an evaluation, one row a method: all, or some
    <!-- rows: NAME.json COLUMN ... FIELD=VALUE ... --> ... <!-- end -->    the rows of a benchmark, some or all
"""

import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cache import atomic_write
from .cli import CommandParser, one_line_errors
from .methods import METHODS
from .metrics import MEASURES, Qrels, RetrievalMetrics, Run, paired_bootstrap, per_query, ranks, wins_ties_losses
from .names import published_command

UPPER_BOUND = "human-rewrite"  # needs a person at every turn, so it is never the best method that can be deployed
BASELINE = "generate-then-encode"
CUTOFF = 10


def build_result(
    dataset: str,
    split: str,
    query_ids: Sequence[str],
    turns: Sequence[int],
    conversations: Sequence[str],
    num_documents: int,
    command: str,
    runs: Mapping[str, Run],
    qrels: Qrels,
    latencies: Mapping[str, Sequence[float] | None],
    baseline: str = BASELINE,
) -> dict[str, Any]:
    """Measures the runs and compares each with the baseline, query by query.

    Args:
        query_ids: the queries; every list in the result has their order.
        turns: the number of user turns so far, for each query.
        conversations: the conversation of each query; the intervals resample conversations.
        command: the command line that gives these numbers again.
        runs: the run of every method.
        latencies: milliseconds of each timed query after the prefill, by method; `None` or no entry if not timed.
        baseline: the method to compare with. If it was not run, `delta` and `wins_ties_losses` are `None`.

    Returns:
        A dict for `write_json`. `delta` holds `[difference, low, high]` with the 95% interval; `wins_ties_losses` counts
        queries with a relevant document in the top 10; `ranks` are 1-based, `None` past 1000.

    Raises:
        ValueError: `turns` or `conversations` of another length than `query_ids`, and what `metrics.per_query` raises.
    """
    if len(turns) != len(query_ids):
        raise ValueError(f"There are {len(turns)} turns for {len(query_ids)} queries, wanted one a query.")
    metric, judged = RetrievalMetrics(), {query_id: qrels.get(query_id, {}) for query_id in query_ids}
    values = {method: per_query(run, judged, query_ids) for method, run in runs.items()}
    positions = {method: ranks(run, qrels, query_ids) for method, run in runs.items()}
    methods = {}
    for method in _ordered(runs):
        delta = outcome = None
        if baseline in runs:
            delta = {
                name: list(paired_bootstrap(values[method][name], values[baseline][name], conversations))
                for name in MEASURES
            }
            outcome = wins_ties_losses(in_top(positions[method]), in_top(positions[baseline]))
        methods[method] = {
            **metric.compute(run=runs[method], qrels=judged),
            "delta": delta,
            "wins_ties_losses": outcome,
            "latency_ms": _percentiles(latencies.get(method)),
            "ranks": positions[method],
        }
    return {
        "dataset": dataset,
        "split": split,
        "num_queries": len(query_ids),
        "num_documents": num_documents,
        "command": command,
        "baseline": baseline,
        "environment": environment(),
        "methods": methods,
        "query_ids": list(query_ids),
        "turns": [int(turn) for turn in turns],
    }


def environment() -> dict[str, Any]:
    """Versions and processor counts; nothing that names a machine or a person."""
    import faiss
    import torch

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{package: version(package) for package in ("torch", "transformers", "sentence-transformers")},
        "faiss": faiss.__version__,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def write_json(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the result, indented, with every innermost list on one line. The file is never incomplete."""
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    # A line break is never inside a JSON string, so this meets lists only.
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s*\]", lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]", text)
    with atomic_write(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_result(path: str | os.PathLike[str], *wanted: str) -> dict[str, Any]:
    """Reads a JSON file. Raises `ValueError`, naming the file, if it is damaged or lacks one of the `wanted` fields."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file, or a damaged one ({error}); make it again") from error
    lacking = [name for name in wanted if not isinstance(result, dict) or name not in result]
    if lacking:
        raise ValueError(f"{path} has no field {lacking[0]!r}; pass a file that train.py, eval.py or a benchmark wrote")
    return result


def print_table(result: Mapping[str, Any]) -> None:
    """Prints one row a method, the best deployable value of each column in bold; plain text, 120 wide, into a pipe."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120, color_system=None)
    narrow = console.width < 118
    table = Table(title=_caption(result), title_style="", title_justify="left", box=box.SIMPLE, padding=(0, 0))
    header, rows = _table(result)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        cells = [
            (cell.replace("+question", "\n+question").replace(" [", "\n[") if narrow else cell, best)
            for cell, best in row
        ]
        table.add_row(*(f"[bold]{escape(cell)}[/bold]" if best else escape(cell) for cell, best in cells))
    console.print(table)


def markdown_table(result: Mapping[str, Any], methods: Sequence[str] = ()) -> str:
    """The table of `print_table` in Markdown; of some `methods` only, it has quality and latency alone."""
    header, rows = _table(result)
    if methods:
        keep = [0, 1, 2, len(header) - 1]
        header = [header[i] for i in keep]
        rows = [[row[i] for i in keep] for row in rows if row[0][0] in methods]
    lines = [
        "| " + " | ".join(_flat(name) for name in header) + " |",
        "|---" + "|---:" * (len(header) - 1) + "|",
        *("| " + " | ".join(f"**{cell}**" if best else cell for cell, best in row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def in_top(positions: Sequence[int | None]) -> np.ndarray:
    """1.0 for each query with a relevant document in the top 10, 0.0 for the others."""
    return np.array([position is not None and position <= CUTOFF for position in positions], dtype=np.float64)


def _ordered(methods: Mapping[str, Any]) -> list[str]:
    known = [method for method in METHODS if method in methods]
    return known + [method for method in methods if method not in METHODS]


def in_order(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The methods of a result with their values, in the order of `methods.METHODS`; unknown ones come last."""
    return [(method, result["methods"][method]) for method in _ordered(result["methods"])]


def _percentiles(milliseconds: Sequence[float] | None) -> dict[str, float] | None:
    if not milliseconds:
        return None
    p50, p95 = np.percentile(milliseconds, (50, 95))
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3)}


def _caption(result: Mapping[str, Any]) -> str:
    return escape(
        f"{result['dataset']} ({result['split']}): {result['num_queries']:,} queries, "
        f"{result['num_documents']:,} documents; differences to {result['baseline']}"
    )


def _table(result: Mapping[str, Any]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Header and rows; each cell comes with a flag: is it the column's best deployable value?"""
    header = [
        "Method",
        "Recall\n@10",
        "MRR\n@10",
        "nDCG\n@10",
        "Δ Recall@10\n[95% interval]",
        "Δ MRR@10\n[95% interval]",
        "wins/\nties/losses",
        "ms/query,\nmedian",
    ]
    methods = in_order(result)
    deployable = [values for method, values in methods if method != UPPER_BOUND]
    best = {name: max((f"{values[name]:.3f}" for values in deployable), default="") for name in MEASURES}
    fastest = min((values["latency_ms"]["p50"] for values in deployable if values["latency_ms"]), default=None)
    rows = []
    for method, values in methods:
        deploys = method != UPPER_BOUND
        cells = [(method, False)]
        for name in MEASURES:
            cells.append((f"{values[name]:.3f}", deploys and f"{values[name]:.3f}" == best[name]))
        compared = method != result["baseline"] and values["delta"] is not None
        for name in ("recall@10", "mrr@10"):
            cells.append(("{:+.3f} [{:+.3f}, {:+.3f}]".format(*values["delta"][name]) if compared else "–", False))
        cells.append(("{wins}/{ties}/{losses}".format(**values["wins_ties_losses"]) if compared else "–", False))
        median = values["latency_ms"]["p50"] if values["latency_ms"] else None
        cells.append(
            ("–" if median is None else f"{median:,.1f}", deploys and median is not None and median == fastest)
        )
        rows.append(cells)
    return header, rows


def _flat(header: str) -> str:
    return header.replace("/\n", "/").replace("\n@", "@").replace("\n", " ")


def rows_table(rows: list[dict[str, Any]], columns: Sequence[str], **only: str) -> str:
    """Some `columns` of a benchmark's rows in Markdown; with `only`, the rows whose fields have these values."""
    rows = [row for row in rows if all(str(row.get(name)) == value for name, value in only.items())]

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else ""
        return "" if value is None else f"{value:,}" if isinstance(value, (int, float)) else str(value)

    numeric = [all(isinstance(row.get(name), (int, float, type(None))) for row in rows) for name in columns]
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|" + "|".join("---:" if right else "---" for right in numeric) + "|",
        *("| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows),
    ]
    return "\n".join(lines)


def fill_tables(markdown: str, root: Path) -> str:
    """The page with its tables filled from the files that its comments name, relative to `root`; see the module's top."""

    def table(match: re.Match) -> str:
        path = root / match["path"]
        if not path.is_file():
            return match[0]
        if match["kind"] == "table":
            result = read_result(path, "methods", "baseline", "command")
            filled = markdown_table(result, match["words"].split())
        else:
            result = read_result(path, "rows", "command")
            words = match["words"].split()
            only = dict(word.split("=", 1) for word in words if "=" in word)
            filled = rows_table(result["rows"], [word for word in words if "=" not in word], **only)
        command = published_command(result["command"], keep_relative=True)
        return f"{match['marker']}\n{filled.rstrip()}\n\n`{command}`\n<!-- end -->"

    pattern = r"(?P<marker><!-- (?P<kind>table|rows): (?P<path>\S+)(?P<words>[^>]*) -->).*?<!-- end -->"
    return re.sub(pattern, table, markdown, flags=re.DOTALL)


@one_line_errors("results")
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("python -m native_retrieval.results", __doc__)
    parser.add_argument("pages", nargs="+", help="Markdown files, such as results/README.md")
    for page in map(Path, parser.parse_args(argv).pages):
        filled = fill_tables(page.read_text(encoding="utf-8"), page.parent)
        with atomic_write(page) as partial:
            partial.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
