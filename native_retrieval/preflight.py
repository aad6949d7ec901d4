"""Checks before a training begins: what can only fail after hours should fail now, in one line."""

from pathlib import Path

from huggingface_hub import HfApi
from transformers import AutoConfig
from transformers.integrations import get_reporting_integration_callbacks

from configuration_native_retrieval import QUERY_MODES, NativeRetrievalConfig

from .arguments import DataArguments, ModelArguments, NativeRetrievalTrainingArguments, split_source
from .cli import check_writable, nearest
from .metrics import MEASURES
from .names import is_hub_id


def check(model: ModelArguments, data: DataArguments, training: NativeRetrievalTrainingArguments) -> None:
    """Raises `ValueError`, in one line, for arguments that are missing or do not go together."""
    for name, value in (("backbone", model.backbone), ("teacher", model.teacher), ("train_data", data.train_data)):
        if not value:
            raise ValueError(f"{name} is missing; set it in the recipe or with --{name}")
    _check_modes(model, data)
    _check_dev(data, training)
    for flag, directory in (("output_dir", training.output_dir), ("cache_dir", data.cache_dir)):
        check_writable(flag, Path(directory))
    try:
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()  # raises if its package is not installed
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"report_to cannot be {', '.join(training.report_to)}: {' '.join(str(error).split())}"
        ) from error


def _check_modes(model: ModelArguments, data: DataArguments) -> None:
    unknown = set(data.query_modes) - set(QUERY_MODES)
    if unknown or not data.query_modes:
        raise ValueError(f"query_modes {sorted(unknown)} are unknown; choose from {', '.join(QUERY_MODES)}")
    if model.query_mode not in data.query_modes:
        raise ValueError(
            f"query_mode={model.query_mode} is the default of the saved model, but query_modes "
            f"({', '.join(data.query_modes)}) does not train it; set query_mode to one of these"
        )
    lost = set(data.generated_data) - {*data.train_data, *data.dev_data}
    if lost and "generated" in data.query_modes:
        raise ValueError(f"generated_data {sorted(lost)} is in neither train_data nor dev_data; spell it as there")
    if not any(map(data.modes_of, data.train_data)):
        raise ValueError(
            "query_modes is generated, but generated_data names none of train_data; name one, or leave it out"
        )


def _check_dev(data: DataArguments, training: NativeRetrievalTrainingArguments) -> None:
    judged = [entry for entry in data.dev_data if data.modes_of(entry)]
    if training.eval_strategy != "no" and not judged:
        raise ValueError(
            "dev_data is missing, or no query is written for any of it (generated_data); name it, or set "
            "--load_best_model_at_end false --eval_strategy no"
        )
    names = [Path(split_source(entry)[0]).name for entry in data.dev_data]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"dev_data names {', '.join(twice)} twice, and metrics go by that name; rename a folder")
    parts = [f"{Path(split_source(entry)[0]).name}_{mode}" for entry in judged for mode in data.modes_of(entry)]
    metrics = [*MEASURES, *(f"{part}_{name}" for part in parts for name in (*MEASURES, "loss"))]
    metric = str(training.metric_for_best_model).removeprefix("eval_")
    if training.eval_strategy != "no" and metric not in metrics:
        raise ValueError(
            f"metric_for_best_model={training.metric_for_best_model} is not measured{nearest(metric, metrics)}; choose "
            f"from {', '.join(metrics)}"
        )


def check_backbone(model: ModelArguments) -> None:
    """Raises `ValueError`, in one line, if there is no such backbone, or a field of the model does not fit it."""
    try:
        config = AutoConfig.from_pretrained(model.backbone, revision=model.backbone_revision).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone {model.backbone!r} cannot be loaded: {' '.join(str(error).split())}") from error
    context = getattr(config, "max_position_embeddings", None)
    room = model.max_query_tokens + 32  # the query's prompt is a few words
    if context and model.max_prompt_tokens and model.max_prompt_tokens + room > context:
        raise ValueError(
            f"max_prompt_tokens={model.max_prompt_tokens} leaves no room for a query of {model.max_query_tokens} tokens in the "
            f"backbone's context of {context}; at most {context - room}"
        )
    sizes = {name: getattr(config, name) for name in ("hidden_size", "num_hidden_layers", "vocab_size")}
    NativeRetrievalConfig(backbone_name_or_path=model.backbone, **sizes, **model.config_fields)


def check_batch(
    training: NativeRetrievalTrainingArguments, num_examples: int, flag: str = "per_device_train_batch_size"
) -> None:
    """Raises `ValueError` if no batch is full, and `dataloader_drop_last` would leave nothing to train on."""
    batch = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and num_examples < batch:
        raise ValueError(
            f"dataloader_drop_last leaves nothing to train on: {num_examples:,} examples, and a batch takes {batch:,}; "
            f"lower --{flag}, or leave dataloader_drop_last out"
        )


def check_push(model: ModelArguments, training: NativeRetrievalTrainingArguments) -> None:
    """Makes the repository to push to, if it is not there. Raises `ValueError`, in one line, if the push would fail."""
    repository = training.hub_model_id or Path(training.output_dir).absolute().name
    if not model.store_backbone and not is_hub_id(model.backbone):  # as the push itself would say, after hours
        raise ValueError(
            f"store_backbone=False would push a head that nobody can load: the backbone {model.backbone} is no Hub id "
            "(owner/name); set store_backbone, or name the backbone by its Hub id"
        )
    api = HfApi(token=training.hub_token)
    try:
        repository = api.create_repo(repository, private=training.hub_private_repo, exist_ok=True).repo_id
        if training.hub_revision:
            api.create_branch(repository, branch=training.hub_revision, exist_ok=True)
    except Exception as error:  # the Hub's client raises errors of four libraries
        raise ValueError(
            f"nothing can be pushed to {repository!r} ({' '.join(str(error).split())}); log in with `hf auth login`, set "
            "hub_model_id to USER/NAME, or leave push_to_hub out"
        ) from error
