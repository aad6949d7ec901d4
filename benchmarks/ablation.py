# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
What each part is worth: runs of train.py that differ in one thing, on one data set, judged on its dev split.

    # the paper's: every combination of the three losses, and the learning rate of all three
    python benchmarks/ablation.py losses benchmarks/configs/ablation.yaml --output results/ablation-qrecc.json

    # ours: words, copy path, layers, probe
    python benchmarks/ablation.py parts benchmarks/configs/ablation.yaml --output results/ablation-probe.json

Each row is one run, told by its best checkpoint on dev. Rows that are in the output already are not run again, so a
stopped command goes on. A figure is drawn into `figures/` beside the output. Further words go to train.py.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.report import read_result

LOSSES = ("alignment", "contrastive", "rank")
COMBINATIONS = [
    ("rank",),
    ("contrastive",),
    ("alignment",),
    ("alignment", "contrastive"),
    ("alignment", "rank"),
    ("contrastive", "rank"),
    LOSSES,
]
LEARNING_RATES = ("2e-4", "5e-4", "1e-3")
# Without stage a, and without the plain texts among the conversations, which have an alignment of their own.
ALONE = {"lexical_epochs": 0, "plain_text_share": 0}
# The probe's stage runs the backbone in every step: a third of the queries.
PROBE = {"query_modes": ["probe", "context"], "num_probe_tokens": 8, "max_probe_queries": 250}


def loss_rows() -> list[dict]:
    rows = []
    for kept in COMBINATIONS:
        weights = {f"{loss}_weight": 0 for loss in LOSSES if loss not in kept}
        rows.append({"name": " + ".join(kept), "arguments": {**ALONE, **weights}})
    rates = [
        {"name": f"all three, lr {rate}", "arguments": {**ALONE, "learning_rate": rate}} for rate in LEARNING_RATES
    ]
    return rows + rates


def part_rows() -> list[dict]:
    rows = [
        ("as the recipe has it", {}),
        ("layers 3 to 21 of 30, not 4 to 27", {"hidden_state_layers": [3, 8, 12, 17, 21], "copy_layer": 12}),
        ("no stage a (words)", {"lexical_epochs": 0}),
        ("no copy path: the paper's head", {"copy_num_heads": 0}),
        ("no linear skip path", {"head_skip": "false"}),
        ("last layer alone", {"hidden_state_layers": [30], "copy_layer": 30}),
        ("16 context tokens", {"num_context_tokens": 16}),
        *((f"without {loss}", {f"{loss}_weight": 0}) for loss in LOSSES),
        ("probe", PROBE),
        ("probe, 2 tokens", {**PROBE, "num_probe_tokens": 2}),
        ("probe, rank 8", {**PROBE, "adapter_rank": 8}),
    ]
    return [{"name": name, "arguments": arguments} for name, arguments in rows]


ROWS = {"losses": loss_rows, "parts": part_rows}


def words_of(row: dict) -> list[str]:
    """A row's arguments as words on the command line of train.py."""
    words = []
    for name, value in row["arguments"].items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(recipe: str, row: dict, extra: list[str]) -> dict:
    """Trains one row in a folder of its own and returns it with its dev metrics."""
    words = [recipe, *extra, *words_of(row)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train.main([*words, "--output_dir", folder, "--save_total_limit", "1"])
        training_info = json.loads((Path(folder) / "training.json").read_text())
    last = training_info["dev"][
        -1
    ]  # the mean over the dev sets, if there are several; of the probe, where there is one
    metrics = {name: round(last[f"eval_{name}"], 4) for name in ("recall@10", "mrr@10", "ndcg@10")}
    settings = {name: training_info["recipe"][name] for name in ("learning_rate", "num_train_epochs", "seed")}
    return {**row, **settings, **metrics, "seconds": round(time.perf_counter() - start)}


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.9 + 0.3 * len(rows)), layout="constrained")
    for axes, metric, title in zip(
        figure.subplots(1, 2), ("recall@10", "mrr@10"), ("Recall@10", "MRR@10"), strict=True
    ):
        bars = axes.barh([row["name"] for row in rows], [row[metric] for row in rows], color="#0072B2", height=0.65)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
        axes.set_title(f"{title}, dev", loc="left", fontsize=10)
        axes.invert_yaxis()
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xlim(0, 1.2 * max(row[metric] for row in rows))
        axes.set_xticks([])
        if metric == "mrr@10":
            axes.set_yticks([])
    figure.savefig(path, dpi=150)


@one_line_errors("ablation.py")
def main() -> None:
    parser = CommandParser("ablation.py", __doc__)
    parser.add_argument("rows", choices=sorted(ROWS), help="which runs to compare")
    parser.add_argument("recipe", help="a YAML for train.py")
    parser.add_argument("--output", required=True, help="the JSON file to write, and to go on with")
    arguments, extra = parser.parse_known_args()
    output = Path(arguments.output)
    rows = ROWS[arguments.rows]()
    result = read_result(output, "rows") if output.exists() else {"rows": []}
    result["command"] = " ".join(["python", *sys.argv])
    done = {row["name"] for row in result["rows"]}
    figure = output.parent / "figures" / f"{output.stem}.png"
    for number, row in enumerate(rows, start=1):
        if row["name"] in done:
            continue
        print(f"== run {number} of {len(rows)}: {row['name']}", flush=True)
        result["rows"].append(run(arguments.recipe, row, extra))
        figure.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, output)
        draw(result["rows"], figure)
    print(f"Written: {output}, {figure}")
    width = max(len(row["name"]) for row in result["rows"])
    print(f"{'run':{width}}  Recall@10  MRR@10  nDCG@10  minutes")
    for row in result["rows"]:
        figures = f"{row['recall@10']:9.3f}  {row['mrr@10']:6.3f}  {row['ndcg@10']:7.3f}  {row['seconds'] / 60:7.1f}"
        print(f"{row['name']:{width}}  {figures}")


if __name__ == "__main__":
    sys.exit(main())
