# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
The effect of each part: runs of train.py that differ in one setting, evaluated on the dev split of one data set.

    # as in the paper: every combination of the three losses, and the learning rate of all three
    python benchmarks/ablation.py losses benchmarks/configs/ablation.yaml --output results/ablation-losses.json

    # lexical pre-training, word encoder, projection head
    python benchmarks/ablation.py parts benchmarks/configs/ablation.yaml --output results/ablation-parts.json

Each row is one run, measured at its best dev checkpoint. Rows that the output already has are not run again, so a stopped
command can be resumed. A figure is drawn into `figures/` beside the output. Other flags are passed to train.py.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from native_retrieval.arguments import parse
from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.results import read_result, write_json

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
# Without lexical pre-training and plain texts, whose loss is always the alignment.
ALONE = {"lexical_epochs": 0, "plain_text_share": 0}


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
        ("the recipe", {}),
        ("no lexical pre-training", {"lexical_epochs": 0}),
        ("one layer in the word encoder", {"encoder_num_layers": 1}),
        ("96 numbers in a code", {"encoder_code_dim": 96}),
        ("a projection head beside the words", {"head_num_layers": 2}),
        ("no words: the paper's head", {"read_words": "false", "head_num_layers": 2}),
        ("the same, last layer alone", {"read_words": "false", "head_num_layers": 2, "hidden_state_layers": [30]}),
        *((f"without {loss}", {f"{loss}_weight": 0}) for loss in LOSSES),
    ]
    return [{"name": name, "arguments": arguments} for name, arguments in rows]


ROWS = {"losses": loss_rows, "parts": part_rows}


def words_of(row: dict) -> list[str]:
    """The arguments of a row as words of a command line."""
    words = []
    for name, value in row["arguments"].items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def train(words: list[str], output_dir: str) -> None:
    """Runs train.py. Raises `ValueError` if it fails."""
    script = Path(__file__).resolve().parent.parent / "train.py"
    command = [sys.executable, str(script), *words, "--output_dir", output_dir, "--save_total_limit", "1"]
    if status := subprocess.run(command).returncode:
        raise ValueError(f"train.py has failed with exit code {status}; its error is above")


def run(recipe: str, row: dict, extra: list[str]) -> dict:
    """Trains one row in a temporary folder and returns the row with its dev metrics."""
    words = [recipe, *extra, *words_of(row)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train(words, folder)
        training_info = json.loads((Path(folder) / "training.json").read_text())
    last = training_info["dev"][-1]  # the mean over the dev sets
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
    parser.add_argument("--output", required=True, help="the JSON file to write, or to resume")
    arguments, extra = parser.parse_known_args()
    output = Path(arguments.output)
    rows = ROWS[arguments.rows]()
    for row in rows:  # a bad recipe or flag raises now, not after hours
        parse([arguments.recipe, *extra, *words_of(row)])
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
        write_json(result, output)
        draw(result["rows"], figure)
    print(f"Written: {output}, {figure}")
    width = max(len(row["name"]) for row in result["rows"])
    print(f"{'run':{width}}  Recall@10  MRR@10  nDCG@10  minutes")
    for row in result["rows"]:
        figures = f"{row['recall@10']:9.3f}  {row['mrr@10']:6.3f}  {row['ndcg@10']:7.3f}  {row['seconds'] / 60:7.1f}"
        print(f"{row['name']:{width}}  {figures}")


if __name__ == "__main__":
    sys.exit(main())
