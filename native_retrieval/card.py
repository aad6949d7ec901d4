"""
The model card, and the push to the Hub: the template `model_card.md` is filled from what training and evaluation wrote.

    # after an evaluation: put its table and figures into the card
    python -m native_retrieval.card outputs/mine results/mine-test.json

    # push the model to the Hub; the card pins the commit that it describes
    python -m native_retrieval.card outputs/mine results/mine-test.json --push_to_hub me/mine
"""

import glob
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData

from configuration_native_retrieval import NativeRetrievalConfig

from .cli import CommandParser
from .figures import plot_training
from .names import base_name, is_hub_id, published_command, published_name
from .results import markdown_table, read_result

TEMPLATE = Path(__file__).resolve().parents[1] / "model_card.md"  # in a clone, and in what a wheel installs
RESULT_FIELDS = ("dataset", "split", "num_queries", "num_documents", "command", "baseline", "methods")
FIGURES = ("by-turn", "failures", "quality-latency")  # of eval.py
METRICS = {"recall@10": "Recall@10", "mrr@10": "MRR@10", "ndcg@10": "nDCG@10"}
# The files of a model. Nothing else in its folder is pushed: no checkpoints, logs, results or notes of this disk.
PUBLISHED = (
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "*_native_retrieval.py",
    "tokenization_*.py",
    "*.safetensors",
    "*.safetensors.*",
    "config.json",
)
PUBLISHED += ("generation_config.json", "processor_config.json", "tokenizer*", "special_tokens_map.json", "vocab.*")
PUBLISHED += (
    "added_tokens.json",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)
PUBLISHED += ("word_tokenizer/**/*", "backbone/**/*", "figures/*.png")


def write_model_card(model_dir: str | os.PathLike, results: Sequence[str | os.PathLike] = ()) -> Path:
    """
    Writes `README.md` beside a saved model. Local paths appear in it by their last part only.

    Args:
        model_dir: holds `config.json`, the weights, and `training.json`, which the Trainer wrote.
        results: result files of eval.py; their figures, in `figures/` beside them, are copied.

    Raises:
        `FileNotFoundError`: if `training.json`, `config.json` or a result is missing.
        `ValueError`: if train.py or eval.py did not write one of them.
    """
    folder = Path(model_dir)
    for name in ("training.json", "config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; write the card of a model that train.py has saved")
    training_info = read_result(folder / "training.json", "backbone", "teacher", "query_modes", "train_data", "command")
    config = NativeRetrievalConfig.from_pretrained(folder)
    repository = training_info.get("repository") or folder.absolute().name
    read = {Path(path): read_result(path, *RESULT_FIELDS) for path in results}
    (folder / "figures").mkdir(exist_ok=True)
    evaluations = [_with_figures(result, path, folder) for path, result in read.items()]
    # The last entry of each dev set is of the checkpoint that was kept.
    dev = {name: value for entry in training_info.get("dev", []) for name, value in entry.items()}
    history = training_info.get("history", [])
    if history:
        plot_training(history, folder / "figures" / "training.png")
    backbone, teacher = (
        published_source(training_info[name], getattr(config, f"{name}_name_or_path"))
        for name in ("backbone", "teacher")
    )
    data = ModelCardData(
        library_name="transformers",
        license=training_info.get("license", "apache-2.0"),
        pipeline_tag="feature-extraction",
        base_model=[backbone] if is_hub_id(backbone) else None,  # the Hub links to its own repositories only
        tags=["native-retrieval", "query-embedding", "arxiv:2603.08429"],
        model_name=Path(repository).name,
        eval_results=_eval_results(evaluations, dev, training_info, config.query_mode) or None,
    )
    seconds, revision = training_info.get("training_seconds"), training_info.get("revision")
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=Path(repository).name,
        repository=repository,
        revision=revision,
        backbone=_linked(backbone),
        teacher=_linked(teacher),
        training_info={**training_info, "command": published_command(training_info["command"])},
        config=config,
        modes=", ".join(f"`{mode}`" for mode in training_info["query_modes"]),
        train_data=", ".join(f"{name} ({count})" for name, count in training_info["train_data"].items()),
        head_parameters=f"{_num_parameters(folder) / 1e6:.1f}M",
        results=evaluations,
        dev={key.removeprefix("eval_"): value for key, value in dev.items() if "@10" in key},
        failures=[figure for result in evaluations for figure in result["failures"]],
        training_figure=bool(history),
        duration=_duration(seconds) if seconds else None,
        energy=_energy(seconds, training_info["device"], training_info.get("processes", 1)) if seconds else None,
    )
    path = folder / "README.md"
    card.save(path)
    return path


def push_model(
    model_dir: str | os.PathLike,
    repository: str,
    results: Sequence[str | os.PathLike] = (),
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """
    Pushes a saved model to the Hub: its files in one commit, then a card whose snippets pin that commit, so that readers
    never run code that is pushed later. The folder's other files (logs, checkpoints, `training.json`) stay here. Files
    that the Hub has already are not sent again.

    Args:
        model_dir, results: as for [`write_model_card`].
        repository: `user/name`; created if it does not exist.
        token: with the right to write; by default the one of `hf auth login` or of `HF_TOKEN`.
        private: whether a new repository is private.
        revision: the branch to push to.

    Raises:
        `FileNotFoundError`: if `training.json`, `config.json` or a result is missing.
        `ValueError`: if nobody else could load the model: its backbone is neither stored with it nor on the Hub.
    """
    folder, api = Path(model_dir), HfApi(token=token)
    config = NativeRetrievalConfig.from_pretrained(folder)
    if not config.store_backbone and not is_hub_id(config.backbone_name_or_path or ""):
        raise ValueError(
            f"{folder} does not hold its backbone (store_backbone=False), and backbone_name_or_path="
            f"{config.backbone_name_or_path!r} is no Hub id (owner/name), so nobody else could load the model; train it with "
            "--store_backbone true, or with a backbone from the Hub"
        )
    write_model_card(folder, results)  # raises if something is missing, before a repository is created
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    _note(folder, repository=repository, revision=None)
    write_model_card(folder, results)
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        allow_patterns=[glob.escape(name) for name in published_files(folder)],
    )
    _note(folder, revision=commit.oid)
    card = write_model_card(folder, results)
    api.upload_file(
        repo_id=repository,
        path_or_fileobj=card,
        path_in_repo="README.md",
        commit_message="Pin the commit that the card describes",
        revision=revision,
    )
    return commit


def published_files(folder: Path) -> list[str]:
    """The files of a saved model that a push sends, relative to its folder."""
    files = {path for pattern in PUBLISHED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in files if not path.name.startswith(("_", ".")))


def published_source(source: str, in_config: str | None) -> str:
    """The name of a backbone or teacher for others: a Hub id, or the last part of a path. `in_config` is the model's own."""
    return base_name(source) if in_config == base_name(source) else published_name(source)


def _with_figures(result: dict[str, Any], path: Path, folder: Path) -> dict[str, Any]:
    """The result of a file for the template, with its table and its figures, which are copied into the model's folder."""
    figures = {"figures": [], "failures": []}
    for name in FIGURES:  # not every file with this prefix: it may be the prefix of another result's name, too
        source = path.parent / "figures" / f"{path.stem}-{name}.png"
        if not source.exists():
            continue
        if source.parent.resolve() != (folder / "figures").resolve():
            shutil.copy(source, folder / "figures" / source.name)
        shown = {"path": f"figures/{source.name}", "caption": source.stem.replace("-", " ")}
        figures["failures" if name == "failures" else "figures"].append(shown)
    return {**result, **figures, "command": published_command(result["command"]), "table": markdown_table(result)}


def _note(folder: Path, **training_info: str | None) -> None:
    path = folder / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **training_info}, indent=2) + "\n")


def _eval_results(evaluations: list, dev: dict, training_info: dict, mode: str) -> list[EvalResult]:
    """The metadata of the Hub: the evaluations of the model's own mode; without any, its dev metrics."""
    measured = [
        (result["dataset"], result["split"], result["methods"][f"native-{mode}"])
        for result in evaluations
        if f"native-{mode}" in result["methods"]
    ]
    if not measured:
        for name in training_info.get("dev_data", {}):
            measured.append((name, "dev", {metric: dev.get(f"eval_{name}_{mode}_{metric}") for metric in METRICS}))
    return [
        EvalResult(
            task_type="text-retrieval",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_name=label,
            metric_value=round(values[metric], 4),
        )
        for dataset, split, values in measured
        for metric, label in METRICS.items()
        if values.get(metric) is not None
    ]


def _num_parameters(folder: Path) -> int:
    """Parameters of the head: the weights at the folder's root."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as weights:
            total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return total


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} minutes"


def _energy(seconds: float, device: str, processes: int) -> str:
    watts = 10 * int(device.split()[0]) if device.endswith("CPU cores") else 400 * processes
    return f"{watts * seconds / 3.6e6:.2g} kWh"


def _linked(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else name


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line on stderr."""
    parser = CommandParser("python -m native_retrieval.card", __doc__)
    parser.add_argument("model", help="folder of a model that train.py has saved")
    parser.add_argument("results", nargs="*", help="result files of eval.py; their figures are copied too")
    parser.add_argument("--push_to_hub", metavar="REPO", help="push the model to this repository of the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    words = parser.parse_args(argv)
    try:
        if words.push_to_hub:
            commit = push_model(words.model, words.push_to_hub, words.results, private=words.private)
            print(f"Pushed: {commit.commit_url}")
        else:
            print(write_model_card(words.model, words.results))
    except Exception as error:  # the Hub's client raises errors of four libraries
        hint = "; nothing is lost here, and the same command continues the push" if words.push_to_hub else ""
        print(f"card: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
