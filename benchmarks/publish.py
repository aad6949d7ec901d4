# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Puts a trained head into the repository: without its backbone, which the configuration names, and with a card of its figures.

    python benchmarks/publish.py --model outputs/general --output pretrained/smollm2-135m-minilm \
        --backbone HuggingFaceTB/SmolLM2-135M-Instruct --teacher sentence-transformers/all-MiniLM-L6-v2 \
        --results results/zero-shot/summary.json
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.loading import load_model

ROOT = Path(__file__).resolve().parent.parent

NOTE = """
## Zero-shot

Conversations of kinds that nothing was trained on. The best other way is the best of those that can be deployed: the
teacher on the last question, on the full history, on both; BM25; a query that the backbone writes, and the teacher encodes.

{table}

The weights were trained, and all this was measured, with a copy of the backbone whose weights had been cut to 4 bits and
back, the one at hand. With the original the stored reference vector differs a little, and loading may say so.

The head's weights: CC BY-SA 4.0, from the conversations that they were trained on. The code: Apache-2.0.
"""


def table(path: str) -> str:
    summary = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    lines = [
        "| set | measure | best other way | native-context | of it | selected-words | of it |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        best = f"{row['best_value']:.3f} ({row['best']})" if "best" in row else ""
        cells = [f"{row[name]:.3f}" if name in row else "" for name in ("native-context", "selected-words")]
        shares = [f"{row[f'ratio_{name}']:.3f}" for name in ("native-context", "selected-words")]
        lines.append(
            f"| {row['set']} | {row['measure']} | {best} | {cells[0]} | {shares[0]} | {cells[1]} | {shares[1]} |"
        )
    return "\n".join(lines)


@one_line_errors("publish")
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("python benchmarks/publish.py", __doc__)
    parser.add_argument("--model", required=True, help="folder of a model that train.py wrote")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--backbone", required=True, help="Hub id of the backbone")
    parser.add_argument("--teacher", required=True, help="Hub id of the teacher")
    parser.add_argument("--results", help="summary.json of benchmarks/zero_shot.py, for the card")
    arguments = parser.parse_args(argv)
    model = load_model(arguments.model)
    model.config.backbone_name_or_path, model.config.backbone_revision = arguments.backbone, "main"
    model.config.teacher_name_or_path, model.config.store_backbone = arguments.teacher, False
    output = Path(arguments.output)
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    for path in output.glob("*_native_retrieval.py"):  # one copy of the code in the repository
        path.unlink()
        path.symlink_to(os.path.relpath(ROOT / path.name, output))
    card = Path(arguments.model, "README.md").read_text(encoding="utf-8")
    trained = Path(arguments.model).name
    for before in ("model_name: {}", "# {}\n", 'repo = "{}"', "export {} folder"):
        name = str(output) if "repo" in before or "export" in before else output.name
        card = card.replace(before.format(trained), before.format(name))
    card = card.replace(
        "There are no results yet: run `eval.py`.", "See Zero-shot, below." if arguments.results else ""
    )
    if arguments.results:
        card += NOTE.format(table=table(arguments.results))
    (output / "README.md").write_text(card, encoding="utf-8")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"Written: {output} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(main())
