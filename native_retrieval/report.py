"""What an evaluation leaves behind: the result (JSON), its table, its figures, and the queries it fails on."""

import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cache import atomic_write
from .cli import CommandParser, one_line_errors
from .metrics import MEASURES, Qrels, Run, paired_bootstrap, per_query, ranks, wins_ties_losses

UPPER_LINE = "human-rewrite"  # needs a person at every turn, so it is never the best deployable method
BASELINE = "generate-then-encode"
METHOD_ORDER = (
    UPPER_LINE,
    "last-question",
    "full-history",
    BASELINE,
    "generate-then-encode+question",
    "bm25-last-question",
    "bm25-full-history",
    "native-generated",
    "native-context",
    "native-probe",
)
CUTOFF = 10
MIN_QUERIES_DRAWN = 5
TURN_BINS = (("1", 1, 1), ("2", 2, 2), ("3", 3, 3), ("4–5", 4, 5), ("6–8", 6, 8), ("9+", 9, None))

# Okabe and Ito's palette: told apart by colour-blind readers. Our methods have the colours, the others are grey.
NATIVE_COLOURS = {"native-generated": "#E69F00", "native-context": "#0072B2", "native-probe": "#D55E00"}
INK, GREY, PALE = "#222222", "#6E6E6E", "#E4E4E4"
TURN_STYLES = {  # the methods that plot_by_turn draws: colour, line style, marker
    UPPER_LINE: (INK, (0, (1, 1.5)), "s"),
    "full-history": (GREY, "-.", "^"),
    BASELINE: (GREY, "--", "D"),
    **{method: (colour, "-", "o") for method, colour in NATIVE_COLOURS.items()},
}


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
        query_ids: the queries, in the order of every list in the result.
        turns: number of user turns so far, one a query.
        conversations: which conversation each query belongs to; the intervals are over conversations.
        command: the command line that a reader repeats to get these numbers.
        runs: the run of every method.
        latencies: milliseconds a query after the prefill, a list a method; `None` or no entry where none were taken.
        baseline: the method of the differences. If it was not run, `delta` and `wins_ties_losses` are `None`.

    Returns:
        A dict that `write_json` writes as it stands. `delta` holds `[difference, low, high]` with the 95% interval;
        `wins_ties_losses` counts queries with a relevant document in the top 10; `ranks` are 1-based, `None` past 1000.

    Raises:
        ValueError: `turns` or `conversations` of another length than `query_ids`, and what `metrics.per_query` raises.
    """
    if len(turns) != len(query_ids):
        raise ValueError(f"There are {len(turns)} turns for {len(query_ids)} queries, wanted one a query.")
    values = {method: per_query(run, qrels, query_ids) for method, run in runs.items()}
    places = {method: ranks(run, qrels, query_ids) for method, run in runs.items()}
    methods = {}
    for method in _ordered(runs):
        delta = outcome = None
        if baseline in runs:
            delta = {
                name: list(paired_bootstrap(values[method][name], values[baseline][name], conversations))
                for name in MEASURES
            }
            outcome = wins_ties_losses(_hits(places[method]), _hits(places[baseline]))
        methods[method] = {
            **{name: float(np.mean(values[method][name])) for name in MEASURES},
            "delta": delta,
            "wins_ties_losses": outcome,
            "latency_ms": _percentiles(latencies.get(method)),
            "ranks": places[method],
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
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{package: version(package) for package in ("torch", "transformers", "sentence-transformers")},
        "faiss": faiss.__version__,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def write_json(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the result, indented, with every innermost list on one line. The file appears complete or not at all."""
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    # A line break is never inside a JSON string, so this meets lists only.
    text = re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s*\]", lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]", text)
    with atomic_write(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_result(path: str | os.PathLike[str], *wanted: str) -> dict[str, Any]:
    """A JSON file with these fields. Raises `ValueError`, naming the file, if it is another one or damaged."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file, or a damaged one ({error}); make it again") from error
    lacking = [name for name in wanted if not isinstance(result, dict) or name not in result]
    if lacking:
        raise ValueError(f"{path} has no field {lacking[0]!r}; give a file that train.py, eval.py or a benchmark wrote")
    return result


def print_table(result: Mapping[str, Any]) -> None:
    """Prints one row a method; the best deployable value of a column is bold. Plain text, 120 wide, when piped."""
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


def markdown_table(result: Mapping[str, Any]) -> str:
    """The table of `print_table` in Markdown."""
    header, rows = _table(result)
    lines = [
        "| " + " | ".join(_flat(name) for name in header) + " |",
        "|---" + "|---:" * (len(header) - 1) + "|",
        *("| " + " | ".join(f"**{cell}**" if best else cell for cell, best in row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def failures(result: Mapping[str, Any], baseline: str, method: str, n: int = 20) -> list[int]:
    """Positions in `query_ids` of the queries on which `method` loses most reciprocal rank to `baseline`.

    Worst first; at most n, and fewer if it loses on fewer. A relevant document past rank 1000 counts as 0.
    """
    theirs, ours = (_reciprocal(result["methods"][name]["ranks"]) for name in (baseline, method))
    losses = theirs - ours
    return [int(row) for row in np.argsort(-losses, kind="stable")[:n] if losses[row] > 0]


def plot_by_turn(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws Recall@10 over the number of user turns so far, a line a method, with the queries counted below."""
    turns = np.asarray(result["turns"])
    groups = [(name, (turns >= first) & (turns <= (last or np.inf))) for name, first, last in TURN_BINS]
    # A point of one or two queries is 0 or 1 by chance, and draws the eye; a tiny set has nothing else to show.
    least = MIN_QUERIES_DRAWN if any(group.sum() >= MIN_QUERIES_DRAWN for _, group in groups) else 1
    groups = [(name, group) for name, group in groups if group.sum() >= least]

    figure, axes = _figure(7.5, 4.4)
    ends = []
    for method in (name for name in _ordered(result["methods"]) if name in TURN_STYLES):
        colour, line, marker = TURN_STYLES[method]
        native = method in NATIVE_COLOURS
        hits = _hits(result["methods"][method]["ranks"])
        shares = [float(hits[group].mean()) for _, group in groups]
        axes.plot(
            shares,
            color=colour,
            linestyle=line,
            marker=marker,
            linewidth=2.4 if native else 1.4,
            markersize=6 if native else 4,
            zorder=3 if native else 2,
            label=method,
        )
        ends.append((shares[-1], method, colour, native))
    axes.set_xticks(range(len(groups)), [f"{name}\nn = {int(group.sum())}" for name, group in groups])
    axes.set_xlabel("User turns so far, and number of queries")
    axes.set_ylim(0, 1.02)
    axes.set_title(f"{_hit_name(result)} by depth of the conversation", loc="left", color=INK)
    heights = _spread([end for end, *_ in ends], gap=0.058, top=1.0)
    for height, (end, method, colour, native) in zip(heights, ends, strict=True):
        axes.annotate(
            method,
            xy=(len(groups) - 1, end),
            xytext=(len(groups) - 1 + 0.22, height),
            va="center",
            color=colour,
            fontsize=10,
            fontweight="bold" if native else "normal",
            annotation_clip=False,
            # To the label's left edge; to its middle, a line would cross the labels between.
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )
    figure.savefig(path, dpi=150)


def plot_quality_latency(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws Recall@10 over the median milliseconds a query; the human rewrite is a line, as nobody can deploy it."""
    figure, axes = _figure(7.5, 4.6)
    points = {
        method: (values["latency_ms"]["p50"], values["recall@10"])
        for method, values in _in_order(result)
        if method != UPPER_LINE and values["latency_ms"]
    }
    for method, (milliseconds, recall) in points.items():
        native = method in NATIVE_COLOURS
        axes.plot(
            milliseconds,
            recall,
            marker="o" if native else "D",
            color=NATIVE_COLOURS.get(method, GREY),
            markersize=10 if native else 6,
            zorder=3,
        )
    axes.set_xscale("log")
    axes.margins(x=0.14, y=0.1)
    if UPPER_LINE in result["methods"]:
        height = result["methods"][UPPER_LINE]["recall@10"]
        axes.set_ylim(top=max(axes.get_ylim()[1], height + 0.02))
        axes.axhline(height, color=INK, linestyle=(0, (1, 1.5)), linewidth=1.2)
        axes.annotate(
            f"{UPPER_LINE} (upper line)",
            xy=(0, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, -4),
            textcoords="offset points",
            va="top",
            color=INK,
        )
    axes.set_xlabel("Milliseconds a query after the prefill (median, log scale)")
    axes.set_title("Recall@10 against the time to a query vector", loc="left", color=INK)
    axes.xaxis.set_major_formatter("{x:g}")
    _label_points(figure, axes, points)
    figure.savefig(path, dpi=150)


def plot_map(queries: Mapping[str, np.ndarray], documents: Mapping[str, tuple[np.ndarray, str]]) -> Figure:
    """
    Two queries and their documents on the two directions in which they differ most (PCA).

    Args:
        queries: a vector each, by name.
        documents: by title, the vector and the colour of the point.
    """
    names = [*queries, *documents]
    vectors = np.stack([*queries.values(), *(vector for vector, _ in documents.values())])
    centred = vectors - vectors.mean(0)
    places = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    figure, axes = _figure(4.6, 3.5)
    colours = dict(zip(queries, (NATIVE_COLOURS["native-context"], NATIVE_COLOURS["native-probe"]), strict=False))
    for name, (x, y) in zip(names, places, strict=True):
        marker, size = ("*", 17) if name in queries else ("o", 8)
        colour = colours[name] if name in queries else documents[name][1]
        axes.plot(x, y, marker, markersize=size, color=colour, markeredgecolor="white", markeredgewidth=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.16)
    axes.set_title("Queries (stars) and documents, by PCA", loc="left", color=INK, fontsize=10)
    short = {name: name if len(name) <= 28 else f"{name[:27]}…" for name in names}
    points = {short[name]: tuple(place) for name, place in zip(names, places, strict=True)}
    _label_points(figure, axes, points, {short[name]: colour for name, colour in colours.items()}, size=9)
    return figure


def plot_training(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws each part of the loss over the epochs, from the Trainer's log."""
    figure, axes = _figure(7.5, 3.6)
    parts = {"alignment_loss": "#0072B2", "contrastive_loss": "#E69F00", "rank_loss": "#D55E00"}
    epochs = [entry["epoch"] for entry in history]
    for part, colour in parts.items():
        values = [entry.get(part) for entry in history]
        if None not in values:
            axes.plot(epochs, values, color=colour, linewidth=1.8)
            axes.annotate(
                f" {part.removesuffix('_loss')}", (epochs[-1], values[-1]), va="center", color=colour, fontsize=10
            )
    axes.margins(x=0.02)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Epoch")
    axes.set_title("Training loss, each part before its weight", loc="left", color=INK)
    figure.savefig(path, dpi=150)


def _ordered(methods: Mapping[str, Any]) -> list[str]:
    known = [method for method in METHOD_ORDER if method in methods]
    return known + [method for method in methods if method not in METHOD_ORDER]


def _in_order(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(method, result["methods"][method]) for method in _ordered(result["methods"])]


def _hits(places: Sequence[int | None]) -> np.ndarray:
    return np.array([place is not None and place <= CUTOFF for place in places], dtype=np.float64)


def _reciprocal(places: Sequence[int | None]) -> np.ndarray:
    return np.array([0.0 if place is None else 1.0 / place for place in places])


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
    """Header, and for every method its cells, each with whether it is the column's best deployable value."""
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
    methods = _in_order(result)
    deployable = [values for method, values in methods if method != UPPER_LINE]
    best = {name: max((f"{values[name]:.3f}" for values in deployable), default="") for name in MEASURES}
    fastest = min((values["latency_ms"]["p50"] for values in deployable if values["latency_ms"]), default=None)
    rows = []
    for method, values in methods:
        deploys = method != UPPER_LINE
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


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, color=GREY)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _hit_name(result: Mapping[str, Any]) -> str:
    """Ranks of the first relevant document give Recall@10 only where every query has one relevant document."""
    same = all(np.isclose(_hits(values["ranks"]).mean(), values["recall@10"]) for _, values in _in_order(result))
    return "Recall@10" if same else "Hit@10"


def _spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Moves heights apart to at least `gap`, and none above `top`, in their order."""
    placed = list(heights)
    order = sorted(range(len(placed)), key=lambda row: -placed[row])
    limit = top
    for row in order:
        placed[row] = min(placed[row], limit)
        limit = placed[row] - gap
    return placed


def _label_points(
    figure: Figure,
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    bold: Mapping[str, str] = NATIVE_COLOURS,
    size: float | None = None,
) -> None:
    """Writes each point's name at the first place around it that is free of names, points; `bold` ones in a colour."""
    figure.draw_without_rendering()
    taken = [line.get_window_extent().padded(4) for line in axes.lines]
    taken += [text.get_window_extent() for text in axes.texts]
    frame = axes.get_window_extent()
    places = [
        (9, 0, "left", "center"),
        (-9, 0, "right", "center"),
        (0, 9, "center", "bottom"),
        (0, -9, "center", "top"),
    ]
    places += [(x, y, side, "center") for y in (12, -12, 24, -24, 36, -36) for x, side in ((9, "left"), (-9, "right"))]
    for method, point in points.items():
        label: Annotation | None = None
        for x, y, horizontal, vertical in places:
            if label is not None:
                label.remove()
            label = axes.annotate(
                method,
                xy=point,
                xytext=(x, y),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=bold.get(method, INK),
                fontweight="bold" if method in bold else "normal",
                fontsize=size,
                parse_math=False,  # a title may have dollar signs in it
            )
            extent = label.get_window_extent()
            inside = frame.x0 <= extent.x0 and extent.x1 <= frame.x1 and frame.y0 <= extent.y0 and extent.y1 <= frame.y1
            if inside and not any(extent.overlaps(other) for other in taken):
                break
        if label is not None:
            taken.append(label.get_window_extent())


def rows_table(rows: list[dict[str, Any]], columns: Sequence[str], **only: str) -> str:
    """The `columns` of a benchmark's rows, those whose fields are as `only` says, in Markdown."""
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
    """
    The text with its tables filled from result files, where these are there:

        <!-- table: results/NAME.json --> ... <!-- end -->                            an evaluation
        <!-- rows: results/bench-NAME.json COLUMN ... FIELD=VALUE ... --> ... <!-- end -->    a benchmark's rows
    """

    def table(match: re.Match) -> str:
        path = root / match["path"]
        if not path.is_file():
            return match[0]
        if match["kind"] == "table":
            result = read_result(path, "methods", "baseline", "command")
            filled = markdown_table(result)
        else:
            result = read_result(path, "rows", "command")
            words = match["words"].split()
            only = dict(word.split("=", 1) for word in words if "=" in word)
            filled = rows_table(result["rows"], [word for word in words if "=" not in word], **only)
        return f"{match['marker']}\n{filled}\n\n`{result['command']}`\n<!-- end -->"

    pattern = r"(?P<marker><!-- (?P<kind>table|rows): (?P<path>\S+)(?P<words>[^>]*) -->).*?<!-- end -->"
    return re.sub(pattern, table, markdown, flags=re.DOTALL)


@one_line_errors("report")
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("python -m native_retrieval.report", "Fills the tables of pages from the result files.")
    parser.add_argument("pages", nargs="+", help="Markdown files, such as README.md")
    for page in map(Path, parser.parse_args(argv).pages):
        filled = fill_tables(page.read_text(encoding="utf-8"), page.parent)
        with atomic_write(page) as partial:
            partial.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
