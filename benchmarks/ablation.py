# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
The paper's ablation: every combination of the three losses, and the learning rate of all three, on one data set.

    python benchmarks/ablation.py configs/ablation.yaml --output results/ablation-qrecc.json

Each row is one run of train.py on the recipe, told by its best checkpoint on the dev split. Rows that are in the output
already are not run again. Further words go to train.py.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train

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
LEARNING_RATES = (2e-4, 5e-4, 1e-3)


def rows() -> list[dict]:
    """Every run: its losses and, where it is not the recipe's, its learning rate."""
    combinations = [{"losses": list(losses), "learning_rate": None} for losses in COMBINATIONS]
    return combinations + [{"losses": list(LOSSES), "learning_rate": rate} for rate in LEARNING_RATES]


def run(recipe: str, row: dict, extra: list[str]) -> dict:
    """Trains one row in a folder of its own and returns it with its dev metrics."""
    words = [recipe, *extra]
    for loss in LOSSES:
        if loss not in row["losses"]:
            words += [f"--{loss}_weight", "0"]
    if row["learning_rate"]:
        words += ["--learning_rate", str(row["learning_rate"])]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        train.main([*words, "--output_dir", folder, "--save_total_limit", "1"])
        facts = json.loads((Path(folder) / "training.json").read_text())
    last = facts["dev"][-1]
    metrics = {key.removeprefix("eval_"): round(value, 4) for key, value in last.items() if key.endswith("@10")}
    return {
        **row,
        "learning_rate": facts["recipe"]["learning_rate"],
        "epochs": facts["recipe"]["num_train_epochs"],
        **metrics,
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML for train.py")
    parser.add_argument("--output", default="results/ablation-qrecc.json", help="result file (default: %(default)s)")
    arguments, extra = parser.parse_known_args()
    output = Path(arguments.output)
    result = json.loads(output.read_text()) if output.exists() else {"rows": []}
    result["command"] = " ".join(["python", *sys.argv])
    done = len(result["rows"])
    for number, row in enumerate(rows()[done:], start=done + 1):
        print(f"== run {number} of {len(rows())}: {' + '.join(row['losses'])}, lr {row['learning_rate'] or 'recipe'}")
        result["rows"].append(run(arguments.recipe, row, extra))
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, output)
    width = max(len(" + ".join(row["losses"])) for row in result["rows"])
    print(f"{'losses':{width}}  {'lr':>7}  Recall@10  MRR@10  nDCG@10")
    for row in result["rows"]:
        names = " + ".join(row["losses"])
        print(
            f"{names:{width}}  {row['learning_rate']:7.0e}  {row['recall@10']:9.3f}  {row['mrr@10']:6.3f}"
            f"  {row['ndcg@10']:7.3f}"
        )


if __name__ == "__main__":
    main()
