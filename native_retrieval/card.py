"""The model card: the template `model_card.md`, filled from what training and evaluation left in the model's folder."""

import argparse
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import safetensors
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from configuration_native_retrieval import NativeRetrievalConfig

from .report import markdown_table

TEMPLATE = Path(__file__).resolve().parent.parent / "model_card.md"
METRICS = {"recall@10": "Recall@10", "mrr@10": "MRR@10", "ndcg@10": "nDCG@10"}


def write_model_card(model_dir: str | os.PathLike, results: Sequence[str | os.PathLike] = ()) -> Path:
    """
    Writes `README.md` beside a saved model.

    Args:
        model_dir: holds `config.json`, the weights, and `training.json`, which the Trainer wrote.
        results: result files of eval.py; figures named after them are looked for beside them and copied in.

    Raises:
        `FileNotFoundError`: if `training.json`, `config.json` or a result is missing.
    """
    folder = Path(model_dir)
    for name in ("training.json", "config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing; a card is written for a model that train.py has saved"
            )
    facts = json.loads((folder / "training.json").read_text())
    config = NativeRetrievalConfig.from_pretrained(folder)
    tables, entries = [], []
    repository = facts.get("repository") or folder.name
    for path in map(Path, results):
        result = json.loads(path.read_text())
        figures = []
        for source in sorted((path.parent / "figures").glob(f"{path.stem}-*.png")):
            (folder / "figures").mkdir(exist_ok=True)
            shutil.copy(source, folder / "figures" / source.name)
            figures.append({"path": f"figures/{source.name}", "caption": source.stem.replace("-", " ")})
        tables.append({**result, "table": markdown_table(result), "figures": figures})
        native = result["methods"].get(f"native-{config.query_mode}")
        for name, label in METRICS.items():
            if native:
                entries.append(
                    EvalResult(
                        task_type="text-retrieval",
                        dataset_type=result["dataset"],
                        dataset_name=result["dataset"],
                        dataset_split=result["split"],
                        metric_type=name,
                        metric_name=label,
                        metric_value=round(native[name], 4),
                    )
                )
    local = Path(facts["backbone"]).exists()
    data = ModelCardData(
        library_name="transformers",
        license="apache-2.0",
        pipeline_tag="feature-extraction",
        # The Hub links to repositories only; a folder of ours means nothing there.
        base_model=None if local else [facts["backbone"]],
        tags=["native-retrieval", "query-embedding", "arxiv:2603.08429"],
        model_name=Path(repository).name,
        eval_results=entries or None,
    )
    parameters = 0
    for weights_file in folder.glob("*.safetensors"):
        with safetensors.safe_open(weights_file, "pt") as weights:
            keys = [key for key in weights.keys() if not key.startswith("backbone.")]  # noqa: SIM118 (no mapping)
            parameters += sum(math.prod(weights.get_slice(key).get_shape()) for key in keys)
    dev = facts["dev"][-1] if facts.get("dev") else {}
    revision = facts.get("revision")
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=Path(repository).name,
        repository=repository,
        revision_hint=", revision" if revision else "",
        revision_value=f', "{revision}"' if revision else "",
        revision_arguments="revision=revision, code_revision=revision, " if revision else "",
        backbone_url="." if local else f"https://huggingface.co/{facts['backbone']}",
        teacher_url="." if Path(facts["teacher"]).exists() else f"https://huggingface.co/{facts['teacher']}",
        facts={**facts, "backbone": _name(facts["backbone"]), "teacher": _name(facts["teacher"])},
        config=config,
        modes=", ".join(f"`{mode}`" for mode in facts["query_modes"]),
        train_data=", ".join(f"{name} ({count})" for name, count in facts["train_data"].items()),
        head_parameters=f"{parameters / 1e6:.1f}M",
        results=tables,
        dev={key.removeprefix("eval_"): value for key, value in dev.items() if "@10" in key},
    )
    path = folder / "README.md"
    card.save(path)
    return path


def _name(source: str) -> str:
    """A Hub id as it is; of a local path the last part, so that no card tells of its author's disk."""
    return Path(source).name if Path(source).exists() else source


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a saved model's card anew, with results of eval.py in it.")
    parser.add_argument("model", help="folder that train.py has saved")
    parser.add_argument("results", nargs="*", help="result files of eval.py; their figures are copied too")
    words = parser.parse_args()
    print(write_model_card(words.model, words.results))
