"""
The model card, and the way to the Hub: the template `model_card.md`, filled from what training and evaluation left in
the model's folder.

    # after an evaluation: its table and figures into the card
    python -m native_retrieval.card outputs/mine results/mine-test.json

    # and the whole folder to the Hub, with the card pinning the commit that it describes
    python -m native_retrieval.card outputs/mine results/mine-test.json --push_to_hub me/mine
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors
from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from configuration_native_retrieval import NativeRetrievalConfig

from .cli import CommandParser
from .report import markdown_table, plot_training, read_result

TEMPLATE = Path(__file__).resolve().parent.parent / "model_card.md"
RESULT_FIELDS = ("dataset", "split", "num_queries", "num_documents", "command", "baseline", "methods")
FIGURES = ("by-turn", "failures", "quality-latency")  # of eval.py
METRICS = {"recall@10": "Recall@10", "mrr@10": "MRR@10", "ndcg@10": "nDCG@10"}


def write_model_card(model_dir: str | os.PathLike, results: Sequence[str | os.PathLike] = ()) -> Path:
    """
    Writes `README.md` beside a saved model.

    Args:
        model_dir: holds `config.json`, the weights, and `training.json`, which the Trainer wrote.
        results: result files of eval.py; figures named after them are looked for beside them and copied in.

    Raises:
        `FileNotFoundError`: if `training.json`, `config.json` or a result is missing.
        `ValueError`: if one of them is not what train.py or eval.py wrote.
    """
    folder = Path(model_dir)
    for name in ("training.json", "config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing; a card is written for a model that train.py has saved"
            )
    training_info = read_result(folder / "training.json", "backbone", "teacher", "query_modes", "train_data", "command")
    config = NativeRetrievalConfig.from_pretrained(folder)
    tables, entries, failures = [], [], []
    repository = training_info.get("repository") or folder.name
    evaluations = {path: read_result(path, *RESULT_FIELDS) for path in map(Path, results)}
    (folder / "figures").mkdir(exist_ok=True)
    for path, result in evaluations.items():
        figures = []
        for name in FIGURES:  # not every file that begins so: another result's name may begin with this one's
            source = path.parent / "figures" / f"{path.stem}-{name}.png"
            if not source.exists():
                continue
            if source.parent.resolve() != (folder / "figures").resolve():
                shutil.copy(source, folder / "figures" / source.name)
            shown = {"path": f"figures/{source.name}", "caption": source.stem.replace("-", " ")}
            (failures if source.stem.endswith("failures") else figures).append(shown)
        command = _without_folders(result["command"])
        tables.append({**result, "command": command, "table": markdown_table(result), "figures": figures})
        if native := result["methods"].get(f"native-{config.query_mode}"):
            entries += _eval_results(result["dataset"], result["split"], native)
    # Each data set has a log entry of its own; the last of each is of the checkpoint that was kept.
    dev = {name: value for entry in training_info.get("dev", []) for name, value in entry.items()}
    if not entries:
        for name in training_info.get("dev_data", {}):
            prefix = f"eval_{name}_{config.query_mode}_"
            entries += _eval_results(name, "dev", {metric: dev.get(prefix + metric) for metric in METRICS})
    history = training_info.get("history", [])
    if history:
        plot_training(history, folder / "figures" / "training.png")
    data = ModelCardData(
        library_name="transformers",
        license=training_info.get("license", "apache-2.0"),
        pipeline_tag="feature-extraction",
        # The Hub links to repositories only; a folder of ours means nothing there.
        base_model=None if _is_local(training_info["backbone"]) else [training_info["backbone"]],
        tags=["native-retrieval", "query-embedding", "arxiv:2603.08429"],
        model_name=Path(repository).name,
        eval_results=entries or None,
    )
    parameters = 0
    for weights_file in folder.glob("*.safetensors"):
        with safetensors.safe_open(weights_file, "pt") as weights:
            keys = [key for key in weights.keys() if not key.startswith("backbone.")]  # noqa: SIM118 (no mapping)
            parameters += sum(math.prod(weights.get_slice(key).get_shape()) for key in keys)
    revision = training_info.get("revision")
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=Path(repository).name,
        repository=repository,
        revision_hint=", revision" if revision else "",
        revision_value=f', "{revision}"' if revision else "",
        revision_arguments="revision=revision, code_revision=revision, " if revision else "",
        backbone=_linked(training_info["backbone"]),
        teacher=_linked(training_info["teacher"]),
        training_info={**training_info, "command": _without_folders(training_info["command"])},
        config=config,
        modes=", ".join(f"`{mode}`" for mode in training_info["query_modes"]),
        train_data=", ".join(f"{name} ({count})" for name, count in training_info["train_data"].items()),
        head_parameters=f"{parameters / 1e6:.1f}M",
        results=tables,
        dev={key.removeprefix("eval_"): value for key, value in dev.items() if "@10" in key},
        failures=failures,
        training_figure=bool(history),
        duration=_duration(training_info["training_seconds"]) if "training_seconds" in training_info else None,
        energy=_energy(training_info["training_seconds"], training_info["device"], training_info.get("processes", 1))
        if "training_seconds" in training_info
        else None,
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
    A saved model to the Hub: the folder in one commit, then a card whose snippets pin that commit, so that nobody who
    copies them runs code that is pushed later. What the Hub has already is not sent again.

    Args:
        model_dir, results: as for [`write_model_card`].
        repository: `user/name`; made if it is not there.
        token: with the right to write; by default the one of `hf auth login` or of `HF_TOKEN`.
        private: whether a new repository is private.
        revision: the branch to push to.

    Raises:
        `FileNotFoundError`: if `training.json`, `config.json` or a result is missing.
    """
    folder, api = Path(model_dir), HfApi(token=token)
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    _note(folder, repository=repository, revision=None)
    write_model_card(folder, results)
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        # training.json names folders of this disk; the card has what others need of it.
        ignore_patterns=["checkpoint-*", "backbone/*", "*.bin", "training.json", "_*"],
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


def _note(folder: Path, **training_info: str | None) -> None:
    path = folder / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **training_info}, indent=2) + "\n")


def _eval_results(dataset: str, split: str, metrics: dict[str, float | None]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-retrieval",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=name,
            metric_name=label,
            metric_value=round(metrics[name], 4),
        )
        for name, label in METRICS.items()
        if metrics.get(name) is not None
    ]


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} minutes"


def _energy(seconds: float, device: str, processes: int) -> str:
    watts = 10 * int(device.split()[0]) if device.endswith("CPU cores") else 400 * processes
    return f"{watts * seconds / 3.6e6:.2g} kWh"


def _linked(source: str) -> str:
    """A link to a Hub id; of a local path the last part, so that no card tells of its author's disk."""
    return Path(source).name if _is_local(source) else f"[{source}](https://huggingface.co/{source})"


def _without_folders(command: str) -> str:
    """A command without the folders of whole paths, for the same reason."""
    words = (word.rpartition("=") for word in command.split(" "))
    return " ".join(flag + sign + (Path(value).name if os.path.isabs(value) else value) for flag, sign, value in words)


def _is_local(source: str) -> bool:
    """Whether a model's name is a path, of this disk or another's."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return True
    return Path(source).exists()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 after one line on stderr."""
    parser = CommandParser("python -m native_retrieval.card", __doc__)
    parser.add_argument("model", help="folder that train.py has saved")
    parser.add_argument("results", nargs="*", help="result files of eval.py; their figures are copied too")
    parser.add_argument("--push_to_hub", metavar="REPO", help="push the folder to this repository of the Hub")
    parser.add_argument("--private", action="store_true", help="make it private, if it is new")
    words = parser.parse_args(argv)
    try:
        if words.push_to_hub:
            commit = push_model(words.model, words.push_to_hub, words.results, private=words.private)
            print(f"Pushed: {commit.commit_url}")
        else:
            print(write_model_card(words.model, words.results))
    except Exception as error:  # the Hub's client raises errors of four libraries
        hint = "; nothing here is lost, and the same command goes on" if words.push_to_hub else ""
        print(f"card: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
