"""The figures of an evaluation, of a training, of a backbone's heads and of the demo page, by matplotlib."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

from .results import BASELINE, UPPER_BOUND, in_order, in_top

MIN_QUERIES_DRAWN = 5
TURN_BINS = (("1", 1, 1), ("2", 2, 2), ("3", 3, 3), ("4–5", 4, 5), ("6–8", 6, 8), ("9+", 9, None))

# The palette of Okabe and Ito, which colour-blind readers can tell apart. Our methods are coloured, the others grey.
NATIVE_COLOURS = {"native-generated": "#E69F00", "native-context": "#0072B2"}
PAIR = ("#0072B2", "#D55E00")
INK, GREY, PALE = "#222222", "#6E6E6E", "#E4E4E4"
TURN_STYLES = {  # the methods that plot_by_turn draws: colour, line style, marker
    UPPER_BOUND: (INK, (0, (1, 1.5)), "s"),
    "full-history": (GREY, "-.", "^"),
    BASELINE: (GREY, "--", "D"),
    **{method: (colour, "-", "o") for method, colour in NATIVE_COLOURS.items()},
}


def plot_by_turn(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws Recall@10 over the number of user turns so far, one line a method, with the number of queries below."""
    turns = np.asarray(result["turns"])
    groups = [(name, (turns >= first) & (turns <= (last or np.inf))) for name, first, last in TURN_BINS]
    # Points of few queries are mostly chance and are left out, unless the set has no others.
    least = MIN_QUERIES_DRAWN if any(group.sum() >= MIN_QUERIES_DRAWN for _, group in groups) else 1
    groups = [(name, group) for name, group in groups if group.sum() >= least]

    figure, axes = _figure(7.5, 4.4)
    ends = []
    for method, values in in_order(result):
        if method not in TURN_STYLES:
            continue
        colour, line, marker = TURN_STYLES[method]
        native = method in NATIVE_COLOURS
        hits = in_top(values["ranks"])
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
            # The line ends at the label's left edge; one to its middle would cross other labels.
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
    """Draws Recall@10 over the median milliseconds a query; the human rewrite, which nobody can deploy, is a line."""
    figure, axes = _figure(7.5, 4.6)
    points = {
        method: (values["latency_ms"]["p50"], values["recall@10"])
        for method, values in in_order(result)
        if method != UPPER_BOUND and values["latency_ms"]
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
    if UPPER_BOUND in result["methods"]:
        height = result["methods"][UPPER_BOUND]["recall@10"]
        axes.set_ylim(top=max(axes.get_ylim()[1], height + 0.02))
        axes.axhline(height, color=INK, linestyle=(0, (1, 1.5)), linewidth=1.2)
        axes.annotate(
            f"{UPPER_BOUND} (upper bound)",
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
    Draws up to two queries and their documents in two dimensions, by PCA.

    Args:
        queries: vectors by name.
        documents: vector and colour of the point, by title.
    """
    names = [*queries, *documents]
    vectors = np.stack([*queries.values(), *(vector for vector, _ in documents.values())])
    centred = vectors - vectors.mean(0)
    positions = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    figure, axes = _figure(4.6, 3.5)
    colours = dict(zip(queries, PAIR, strict=False))
    for name, (x, y) in zip(names, positions, strict=True):
        marker, size = ("*", 17) if name in queries else ("o", 8)
        colour = colours[name] if name in queries else documents[name][1]
        axes.plot(x, y, marker, markersize=size, color=colour, markeredgecolor="white", markeredgewidth=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.16)
    axes.set_title("Queries (stars) and documents, by PCA", loc="left", color=INK, fontsize=10)
    short = {name: name if len(name) <= 28 else f"{name[:27]}…" for name in names}
    points = {short[name]: tuple(position) for name, position in zip(names, positions, strict=True)}
    _label_points(figure, axes, points, {short[name]: colour for name, colour in colours.items()}, size=9)
    return figure


def plot_training(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws each part of the loss over the epochs, from the Trainer's log history."""
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


def plot_heads(result: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws how well each attention head of a backbone finds the words that questions leave out; see `heads.describe`."""
    names, layers = list(result["average_precision"]), result["layers"]
    # The mean over data sets, then the better asker: (layers, heads).
    values = np.mean([list(askers.values()) for askers in result["average_precision"].values()], axis=0).max(0)
    figure, axes = _figure(max(7.5, 2.5 + 0.26 * len(layers)), max(3.2, 1.6 + 0.26 * values.shape[1]))
    axes.grid(False)
    chance = float(np.mean(list(result["chance"].values())))
    cells = axes.pcolormesh(values.T, cmap="Blues", vmin=chance, vmax=max(values.max(), chance + 0.01))
    for name in result["selection_heads"]:
        layer, head = map(int, name.split("."))
        corner = (layers.index(layer) + 0.06, head + 0.06)
        axes.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor=PAIR[1], linewidth=1.8))
    for axis, labels in ((axes.xaxis, layers), (axes.yaxis, range(values.shape[1]))):
        every = 1 + len(labels) // 33
        axis.set_ticks(np.arange(0, len(labels), every) + 0.5, [str(label) for label in labels[::every]], fontsize=9)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlabel("Layer")
    axes.set_ylabel("Head")
    turns = ", ".join(f"{name} ({result['turns'][name]:,} turns)" for name in names)
    axes.set_title(
        f"{result['backbone']}: which attention heads point at the words that a question leaves out\n",
        loc="left",
        color=INK,
    )
    axes.text(
        0,
        1.02,
        f"The {len(result['selection_heads'])} chosen ones are outlined. Human rewrites of {turns}",
        transform=axes.transAxes,
        color=GREY,
        fontsize=9,
        parse_math=False,
    )
    bar = figure.colorbar(cells, ax=axes, pad=0.02)
    bar.set_label("Mean average precision (palest: chance)", color=INK)
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=150)


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
    """Hits of the first relevant document equal Recall@10 only where every query has one relevant document."""
    same = all(np.isclose(in_top(values["ranks"]).mean(), values["recall@10"]) for _, values in in_order(result))
    return "Recall@10" if same else "Hit@10"


def _spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Moves heights at least `gap` apart and none above `top`; their order stays."""
    spread = list(heights)
    limit = top
    for row in sorted(range(len(spread)), key=lambda row: -spread[row]):
        spread[row] = min(spread[row], limit)
        limit = spread[row] - gap
    return spread


def _label_points(
    figure: Figure,
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    bold: Mapping[str, str] = NATIVE_COLOURS,
    size: float | None = None,
) -> None:
    """Writes each point's name where it covers no other name or point; the names in `bold` have a colour."""
    figure.draw_without_rendering()
    taken = [line.get_window_extent().padded(4) for line in axes.lines]
    taken += [text.get_window_extent() for text in axes.texts]
    frame = axes.get_window_extent()
    offsets = [
        (9, 0, "left", "center"),
        (-9, 0, "right", "center"),
        (0, 9, "center", "bottom"),
        (0, -9, "center", "top"),
    ]
    offsets += [(x, y, side, "center") for y in (12, -12, 24, -24, 36, -36) for x, side in ((9, "left"), (-9, "right"))]
    for method, point in points.items():
        label: Annotation | None = None
        for x, y, horizontal, vertical in offsets:
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
