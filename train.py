# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
r"""
Train a query head for your language model and your index.

The recipe is a YAML file; any field in it can be set on the command line too, which then wins.

    # your own conversations (BEIR layout with messages), your backbone, your index's embedding model, by the recipe of
    # `make demo`; without a GPU `accelerate launch --cpu --num_processes 1`, or it takes one thread
    accelerate launch train.py configs/demo.yaml \
        --backbone Qwen/Qwen3-0.6B \
        --teacher BAAI/bge-small-en-v1.5 \
        --train_data my_logs \
        --dev_data my_logs:dev \
        --plain_text my_logs \
        --output_dir outputs/mine

    # after an interruption, the same command goes on with --resume

    # the paper's setting, on 8 GPUs
    accelerate launch --num_processes 8 train.py configs/paper.yaml --train_data my_logs --dev_data my_logs:dev \
        --push_to_hub --hub_model_id me/my-model

What is costly (teacher vectors, written queries, hidden states) is computed once and kept in `--cache_dir`.
The trained model lands in `--output_dir`: weights, code, tokenizer, model card. Judge it with `eval.py`.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Of a teacher that puts all texts close together, high ones.
NOVELTY_THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)


@dataclass
class ModelArguments:
    """The language model, the teacher, and the head between them."""

    backbone: str = field(default="", metadata={"help": "Causal language model: path or Hub id."})
    backbone_revision: str | None = field(default=None, metadata={"help": "Pins a backbone from the Hub."})
    teacher: str = field(
        default="", metadata={"help": "The index's embedding model: sentence-transformers path or id."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Pins a teacher from the Hub."})
    store_backbone: bool = field(default=True, metadata={"help": "Save the backbone's weights beside the head."})
    query_mode: str = field(default="context", metadata={"help": "Default mode of the saved model."})
    query_prompt: str = field(default="Search query:", metadata={"help": "How the assistant begins to write a query."})
    num_context_tokens: int = field(default=16, metadata={"help": "Last prompt tokens that the head reads."})
    num_probe_tokens: int = field(default=0, metadata={"help": "Learned tokens of the probe mode; 0 leaves it out."})
    adapter_rank: int = field(default=32, metadata={"help": "Rank of the adapter that acts on the probe alone."})
    adapter_num_layers: int = field(default=2, metadata={"help": "Layers that it acts in, the last that are read."})
    max_query_tokens: int = field(default=32, metadata={"help": "Longest written query, in tokens."})
    max_prompt_tokens: int | None = field(default=1024, metadata={"help": "Longest prompt; older turns are dropped."})
    hidden_state_layers: list[int] | None = field(default=None, metadata={"help": "Layers read (default: five)."})
    head_dim: int = field(default=384, metadata={"help": "Width of the head's transformer encoder."})
    head_num_layers: int = field(default=1, metadata={"help": "Its layers."})
    head_num_attention_heads: int = field(default=8, metadata={"help": "Its attention heads."})
    head_dropout: float = field(default=0.1, metadata={"help": "Dropout in the head."})
    head_skip: bool = field(default=True, metadata={"help": "A linear path beside the encoder; the paper has none."})
    copy_num_heads: int = field(default=8, metadata={"help": "Heads of the copy path; 0 is the paper's head."})
    copy_layer: int | None = field(default=None, metadata={"help": "Layer of the copy path's keys."})


@dataclass
class DataArguments:
    """Conversations with relevant documents, and plain text for alignment."""

    train_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders or Hub ids in the BEIR layout with messages, each as NAME or NAME:SPLIT (train)."},
    )
    dev_data: list[str] = field(
        default_factory=list, metadata={"help": "The same, for choosing the checkpoint: NAME or NAME:SPLIT (dev)."}
    )
    train_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "How often each of train_data is seen in an epoch, in whole numbers (default: once); what augmentation_share and "
            "topic_shift_share add is drawn anew each time. Below 1, that share of its queries, the first: the turns of a "
            "conversation stand together, and cost one pass."
        },
    )
    query_modes: list[str] = field(
        default_factory=lambda: ["context"], metadata={"help": "Modes to train: context, generated, probe."}
    )
    generated_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Train and judge the generated mode on these entries of train_data and dev_data only."},
    )
    plain_text: list[str] = field(
        default_factory=list, metadata={"help": "Text files or corpora whose sentences train the alignment."}
    )
    num_plain_texts: int = field(default=100_000, metadata={"help": "Sentences taken of them, evenly spaced."})
    turns_as_text: bool = field(
        default=True,
        metadata={
            "help": "User turns and rewrites of train_data are plain texts too: questions, as the head will meet."
        },
    )
    lexical_epochs: int = field(
        default=5, metadata={"help": "Stage a: passes over the plain texts that train the copy path's words (0: none)."}
    )
    lexical_learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of stage a."})
    lexical_batch_size: int = field(default=512, metadata={"help": "Texts a step and device in stage a."})
    plain_text_share: float = field(
        default=0.25, metadata={"help": "Stage b: plain texts among the conversations, as a share of these."}
    )
    augmentation_share: float = field(
        default=0.2,
        metadata={
            "help": "Share of the training queries that are also seen with typos and with what agents put around a "
            "conversation: system prompts, tools, half turns."
        },
    )
    topic_shift_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of the conversations that are also seen behind 1 to 20 turns of others, so that the head learns to "
            "leave an earlier topic alone."
        },
    )
    probe_epochs: float = field(default=1.0, metadata={"help": "Stage c: passes of the probe over its queries."})
    probe_learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of stage c."})
    max_probe_queries: int | None = field(
        default=None, metadata={"help": "Queries of each data set in stage c, evenly spaced; it runs the backbone."}
    )
    gold_share: float = field(
        default=0.5, metadata={"help": "How far the target of a query without a rewrite moves to its document, 0 to 1."}
    )
    rewrite_gold_share: float = field(default=0.2, metadata={"help": "The same of a query with a rewrite."})
    target_repulsion_threshold: float = field(
        default=0.45,
        metadata={
            "help": "Targets are turned away from earlier answers that are nearer to them than this cosine (1: never)."
        },
    )
    query_repulsion_threshold: float | None = field(
        default=None,
        metadata={
            "help": "The same cosine of the query's own vector to earlier turns, once trained (default: the best of a few on "
            "dev). A higher one finds more, a lower one puts what it finds nearer to the top."
        },
    )
    rank_top_k: int = field(default=128, metadata={"help": "Documents of the teacher's ranking to distil."})
    num_hard_negatives: int = field(default=0, metadata={"help": "Hard negatives a query, from that ranking."})
    max_train_queries: int | None = field(default=None, metadata={"help": "First queries of each data set only."})
    online_features: bool = field(default=False, metadata={"help": "Run the backbone in every step; no cache on disk."})
    license: str = field(
        default="apache-2.0",
        metadata={"help": "The model's, for its card; a stored backbone's terms hold for the whole."},
    )
    data_license: str | None = field(
        default=None, metadata={"help": "What the model card says of the training data's licences."}
    )
    cache_dir: str = field(default=".cache/native_retrieval", metadata={"help": "Where costly things are kept."})

    def __post_init__(self) -> None:
        for name in (
            "augmentation_share",
            "topic_shift_share",
            "gold_share",
            "rewrite_gold_share",
            "target_repulsion_threshold",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in 0 to 1")
        if self.query_repulsion_threshold is not None and not -1 <= self.query_repulsion_threshold <= 1:
            raise ValueError(f"query_repulsion_threshold={self.query_repulsion_threshold} must be a cosine, -1 to 1")
        if self.train_weights and (len(self.train_weights) != len(self.train_data) or min(self.train_weights) <= 0):
            raise ValueError(
                f"train_weights {self.train_weights} must be one number above 0 for each of the {len(self.train_data)} "
                "entries of train_data"
            )
        for weight in self.train_weights:
            if weight > 1 and weight != round(weight):
                raise ValueError(f"train_weights has {weight:g}; above 1 give whole numbers, passes in an epoch")
        if self.rank_top_k < 2:
            raise ValueError(f"rank_top_k={self.rank_top_k} must be at least 2, as one document is no ranking")


@dataclass
class RunArguments:
    """How this run behaves."""

    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir, if any."})
    debug_errors: bool = field(default=False, metadata={"help": "Show the traceback of an error."})


def parse(argv: list[str]):
    """`[recipe.yaml] [--field value ...]` to the four groups of arguments. Raises `ValueError` for a misspelt field."""
    import yaml

    from native_retrieval.cli import Parser
    from native_retrieval.trainer import NativeRetrievalTrainingArguments

    groups = (ModelArguments, DataArguments, RunArguments, NativeRetrievalTrainingArguments)
    ours = (
        NativeRetrievalTrainingArguments.__dataclass_fields__.keys() & NativeRetrievalTrainingArguments.__annotations__
    )
    titles = {
        "the model": [f.name for f in dataclasses.fields(ModelArguments)],
        "the data": [f.name for f in dataclasses.fields(DataArguments)],
        "this run": [f.name for f in dataclasses.fields(RunArguments)],
        "training (every other field of transformers' TrainingArguments works too)": [
            *(f.name for f in dataclasses.fields(NativeRetrievalTrainingArguments) if f.name in ours),
            "gradient_accumulation_steps",
            "max_steps",
            "seed",
            "use_cpu",
            "push_to_hub",
            "hub_model_id",
            "hub_private_repo",
        ],
    }
    parser = Parser(groups, titles, description=__doc__, prog="train.py", usage="%(prog)s [recipe.yaml] [--field ...]")
    fields = {f.name for group in groups for f in dataclasses.fields(group) if f.init}
    recipe = {}
    if argv and not argv[0].startswith("-"):
        path, argv = Path(argv[0]), argv[1:]
        if not path.is_file():
            raise ValueError(f"recipe {path} does not exist; give a YAML file, such as configs/demo.yaml")
        try:
            recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        except Exception as error:  # for a bad date or number, YAML's reader raises whatever Python does
            raise ValueError(f"recipe {path} is not YAML in UTF-8: {' '.join(str(error).split())}") from error
        recipe = {} if recipe is None else recipe
        if not isinstance(recipe, dict):
            raise ValueError(f"recipe {path} holds a {type(recipe).__name__}; write `field: value` lines")
        for name in recipe:
            _known(str(name), fields, f"recipe {path}")
    for argument in argv:
        if argument.startswith("--"):
            _known(argument[2:].split("=")[0].removeprefix("no_"), fields, "command line")
    try:
        *parsed, unused = parser.parse_args_into_dataclasses(
            _as_arguments(recipe) + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except OSError as error:  # transformers takes a field that is no mapping for the name of a JSON file
        raise ValueError(
            f"{error.filename!r}, which a field names, cannot be read ({error.strerror}); give an existing JSON file, or the "
            "mapping itself"
        ) from error
    if unused:
        raise ValueError(f"{unused[0]!r} belongs to no field; see `python train.py --help`")
    return tuple(parsed)


def _as_arguments(recipe: dict) -> list[str]:
    """YAML fields as command-line words: both then pass the same checks and conversions."""
    words = []
    for name, value in recipe.items():
        values = value if isinstance(value, list) else [value]
        for item in values:
            if isinstance(item, (dict, list)) or (isinstance(value, list) and str(item).startswith("--")):
                raise ValueError(f"recipe field {name} holds {item!r:.60}; give a value, or a list of values")
        if isinstance(value, list):
            words += [f"--{name}", *map(str, values)]
        elif value is not None:
            words.append(f"--{name}={value}")  # as one word: a text may begin with a dash
    return words


def _known(name: str, fields: set[str], where: str) -> None:
    from native_retrieval.cli import nearest

    if name not in fields and name not in ("help",):
        hint = nearest(name, fields) or "; see `python train.py --help`"
        raise ValueError(f"{where}: unknown field {name!r}{hint}")


def split_source(entry: str) -> tuple[str, str]:
    """`NAME:SPLIT` to its two parts; of `NAME`, the second is empty."""
    # A drive letter is no name, and a Hub id has no colon.
    source, _, split = entry.rpartition(":") if ":" in entry[2:] else (entry, "", "")
    return source, split


def load_queries_of(entry: str, default_split: str):
    """`NAME` or `NAME:SPLIT` to (name, queries, corpus or None)."""
    from native_retrieval.data import load_queries, load_task, splits

    source, split = split_source(entry)
    split = split or (default_split if default_split in splits(source) else "")
    name = Path(source).name
    if not split:
        return name, load_queries(source), None
    task = load_task(source, split)
    return name, task.queries, task.corpus


def subsample(items: Sequence, count: int) -> list:
    """`count` of the items at most, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def load_data(data_args: DataArguments):
    """Train and dev sets, each a list of (name, queries, corpus or None), and the plain texts."""
    from datasets import Dataset, concatenate_datasets

    from native_retrieval.data import drop_overlap, load_queries, load_texts, splits

    dev = [load_queries_of(entry, "dev") for entry in data_args.dev_data]
    for entry, (_, _, corpus) in zip(data_args.dev_data, dev, strict=True):
        if corpus is None:
            raise ValueError(
                f"dev_data {entry} has no qrels/dev.tsv; add it, or name a split that is there: {entry}:SPLIT"
            )
    names = [name for name, _, _ in dev]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"dev_data names {', '.join(sorted(twice))} twice, and metrics go by that name; rename a folder"
        )
    # Some collections are cut from the same conversations, and a test set of one may stand in the training set of another.
    held_out = [queries for _, queries, _ in dev]
    entries = list(map(split_source, [*data_args.train_data, *data_args.dev_data]))
    for source in dict.fromkeys(source for source, _ in entries):
        if "test" in splits(source) and (source, "test") not in entries:  # who names it trains on it
            held_out.append(load_queries(source, "test"))
    train = []
    weights = data_args.train_weights or [1.0] * len(data_args.train_data)
    for entry, weight in zip(data_args.train_data, weights, strict=True):
        name, queries, corpus = load_queries_of(entry, "train")
        dropped = 0
        for others in held_out:
            queries, count = drop_overlap(queries, others)
            dropped += count
        if dropped:
            print(f"{name}: left out {dropped} training queries whose conversation is in the dev or test data")
        if corpus is None:
            print(f"{name}: no qrels/train.tsv, so it is trained on without documents, towards its questions alone")
        if data_args.max_train_queries:
            queries = queries.select(range(min(data_args.max_train_queries, len(queries))))
        if weight < 1:
            queries = queries.select(range(round(weight * len(queries))))
        if not len(queries):
            raise ValueError(
                f"train_data {entry} has no query left: {dropped} are of conversations that dev or test data have too, "
                "and train_weights and max_train_queries leave none of the others; name other data, or leave it out"
            )
        train.append((name, queries, corpus))
    texts = concatenate_datasets(
        [load_texts(source) for source in data_args.plain_text] or [Dataset.from_dict({"text": []})]
    )
    return train, dev, texts.select(subsample(range(len(texts)), data_args.num_plain_texts))["text"][:]


def written(entry: str, data_args: DataArguments) -> bool:
    """Whether queries are written for these conversations, the slow part of preparing data."""
    return not data_args.generated_data or entry in data_args.generated_data


def questions_of(train) -> list[str]:
    """Every user turn and rewrite that says something on its own."""
    from native_retrieval.data import num_words

    questions = {m["content"] for _, q, _ in train for ms in q["messages"] for m in ms if m["role"] == "user"}
    questions |= {rewrite for _, q, _ in train for rewrite in q["rewrite"] if rewrite}
    return sorted(text for text in questions if num_words(text) > 3)


def fits_context(texts: list[str], build_prompt) -> list[str]:
    """Those of the texts whose prompt is not longer than the model takes."""

    def fits(text: str) -> bool:
        try:
            return bool(build_prompt([{"role": "user", "content": text}]))
        except ValueError:
            return False

    return list(filter(fits, texts))


def varied(queries, share: float, corpus, build_prompt, draw: int = 0):
    """A share of the queries, and their conversations as they may look in an agent, where the prompt has room for that."""
    import random

    from native_retrieval.augmentation import vary

    rng = random.Random(draw)
    rows = subsample(list(range(len(queries))), round(share * len(queries)))
    some = queries.select([(row + draw) % len(queries) for row in rows])
    passages = corpus["text"][:1000] if corpus is not None else []
    conversations = []
    for messages, rewrite in zip(some["messages"], some["rewrite"], strict=True):
        conversations.append(vary(messages, passages, rng, rewrite))
        try:
            build_prompt(conversations[-1])
        except ValueError:  # a long system prompt, and nothing older left to drop
            conversations[-1] = messages
    return some, conversations


def with_topic_shifts(queries, share: float, draw: int = 0):
    """
    The queries of a share of the conversations, and what each of them looks like behind turns of others, which `draw` tells.

    All queries of a conversation stand behind the same turns: so one pass of the backbone serves them.
    """
    import random

    from native_retrieval.augmentation import behind_others

    names = sorted(set(queries["conv"]))
    chosen = set(subsample(names, round(share * len(names))))
    some = queries.select([i for i, name in enumerate(queries["conv"]) if name in chosen])
    everyone = subsample(list(zip(queries["conv"], queries["messages"], strict=True)), 1000)
    others = {name: [messages for other, messages in everyone if other != name] for name in chosen}
    return some, [
        behind_others(messages, others[name], random.Random(f"{draw} {name}"))
        for name, messages in zip(some["conv"], some["messages"], strict=True)
    ]


def model_fields(model_args: ModelArguments) -> dict:
    """Fields of `NativeRetrievalConfig`."""
    return {k: v for k, v in vars(model_args).items() if k not in ("backbone", "teacher") and v is not None}


def check_model_fields(model_args: ModelArguments) -> None:
    """Raises `ValueError` for what cannot become a model, before anything costly has begun."""
    from transformers import AutoConfig

    from configuration_native_retrieval import NativeRetrievalConfig

    try:
        text_config = AutoConfig.from_pretrained(model_args.backbone, revision=model_args.backbone_revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"backbone {model_args.backbone!r} cannot be loaded: {error}") from error
    NativeRetrievalConfig(
        text_config=text_config, backbone_name_or_path=model_args.backbone, **model_fields(model_args)
    )


def new_model(model_args: ModelArguments, teacher):
    """An untrained model, whose copy path starts from the teacher's vectors of the vocabulary."""
    import numpy as np

    from modeling_native_retrieval import NativeRetrievalModel

    vocabulary = SimpleNamespace(
        encode=lambda words: np.array(teacher.cached(words, "query", "Teacher: vocabulary", True)),
        tokenizer=teacher.tokenizer,
    )
    return NativeRetrievalModel.from_backbone(
        model_args.backbone,
        vocabulary,
        teacher_name_or_path=model_args.teacher,
        teacher_fingerprint=teacher.fingerprint,
        **model_fields(model_args),
    )


def train_only(*parts, of) -> None:
    """Freezes everything of a model but these parts (several devices wait for every gradient that is asked for)."""
    of.requires_grad_(False)
    for part in parts:
        if part is not None:
            part.requires_grad_(True)


def choose_novelty_threshold(trainer) -> float:
    """
    Sets the cosine from which on a vector is turned away from a turn to the best on dev, beside the one that was learned,
    and returns it: the losses see single documents, and not who comes first in the index. Each data set counts once, in
    the mode that the model is saved with, if it was trained.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    novelty, mode = model.copy_path.novelty, model.config.query_mode
    parts = {name: part for name, part in trainer.eval_dataset.items() if part.mode == mode}
    metric = f"eval_{trainer.args.metric_for_best_model.removeprefix('eval_')}"
    if not parts or any(name in metric for name in trainer.eval_dataset):  # the metric of a single data set
        parts = trainer.eval_dataset
    better = max if trainer.args.greater_is_better else min
    found, logged = {}, len(trainer.state.log_history)
    for threshold in (novelty.threshold.item(), *NOVELTY_THRESHOLDS):
        novelty.threshold.data.fill_(threshold)
        found[threshold] = trainer.evaluate(parts)[metric]
    del trainer.state.log_history[logged:]  # the card shows what was trained, and then what was chosen
    best = better(found, key=found.get)
    novelty.threshold.data.fill_(best)
    return best


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, of which `trainer_state.json` comes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (FileNotFoundError, ValueError):
        return False
    return True


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Oldest first."""
    return sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def last_whole_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint that was written to its end; one that a stopped run has left half done is passed over."""
    whole = [str(path) for path in checkpoints_of(output_dir) if is_whole(path)]
    return whole[-1] if whole else None


def remove_checkpoints(checkpoints: list[Path]) -> None:
    """Removes these; stopped half way, none of them is left that seems whole, but lacks its weights or those of its best."""
    for checkpoint in reversed(checkpoints):
        (checkpoint / "trainer_state.json").unlink(missing_ok=True)
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint, ignore_errors=True)


def alone_in(output_dir: Path):
    """A lock, for a `with`, on a directory that two trainings would spoil for each other. Raises `ValueError` if one runs."""
    from filelock import FileLock, Timeout

    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / "_training.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another training is writing to output_dir {output_dir}; wait for its end, or name another with --output_dir"
        ) from None


def without_tokens(words: list[str]) -> str:
    """A command as it may be published: what follows `--..._token` is left out."""
    kept = [
        "..." if before.endswith("_token") else word.split("=")[0] + "=..." if "_token=" in word else word
        for before, word in zip(["", *words], words, strict=False)
    ]
    return " ".join(kept)


def device_name(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"


def main(argv: list[str]) -> None:
    with ExitStack() as held:  # until training ends, in whatever way
        run(argv, held)


def run(argv: list[str], held: ExitStack) -> None:
    started = time.monotonic()
    model_args, data_args, run_args, training_args = parse(argv)
    for name, value in (("backbone", model_args.backbone), ("teacher", model_args.teacher)):
        if not value:
            raise ValueError(f"{name} is missing; set it in the recipe or with --{name}")
    if not data_args.train_data:
        raise ValueError("train_data is missing; name at least one folder or Hub id")
    if "probe" in data_args.query_modes and not model_args.num_probe_tokens:
        raise ValueError("query_modes has probe, but num_probe_tokens is 0; set it to 8, for example")
    judged = [entry for entry in data_args.dev_data if "context" in data_args.query_modes or written(entry, data_args)]
    if training_args.eval_strategy != "no" and not judged:
        raise ValueError(
            "dev_data is missing, or no query is written for any of it (generated_data); name it, or set "
            "--load_best_model_at_end false --eval_strategy no"
        )
    output_dir = Path(training_args.output_dir)
    if (left := last_whole_checkpoint(output_dir)) and not run_args.resume:
        raise ValueError(
            f"{left} is of a training that was stopped; add --resume to go on from it, or start anew in another "
            f"--output_dir, or here without {output_dir}/checkpoint-*"
        )

    from native_retrieval.cli import check_writable

    for flag, directory in (("output_dir", training_args.output_dir), ("cache_dir", data_args.cache_dir)):
        check_writable(flag, Path(directory))

    import datasets
    import torch
    from torch.utils.data import ConcatDataset
    from transformers import set_seed
    from transformers.utils import logging

    from configuration_native_retrieval import QUERY_MODES
    from native_retrieval.dataset import build_examples, build_texts
    from native_retrieval.teacher import Teacher
    from native_retrieval.trainer import NativeRetrievalTrainer

    unknown = set(data_args.query_modes) - set(QUERY_MODES)
    if unknown or not data_args.query_modes:
        raise ValueError(f"query_modes {sorted(unknown)} are unknown; choose from {', '.join(QUERY_MODES)}")
    if data_args.query_modes == ["probe"]:
        raise ValueError("query_modes has the probe alone; add context, which the probe adds to")
    if model_args.query_mode not in data_args.query_modes:
        raise ValueError(
            f"query_mode={model_args.query_mode} is what the saved model would answer with, but query_modes "
            f"({', '.join(data_args.query_modes)}) does not train it; set query_mode to one of these"
        )
    lost = set(data_args.generated_data) - {*data_args.train_data, *data_args.dev_data}
    if lost and "generated" in data_args.query_modes:
        raise ValueError(
            f"generated_data {sorted(lost)} is in neither train_data nor dev_data; write it as it stands there"
        )
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if (
        training_args.device.type == "cpu"
        and training_args.world_size == 1
        and 1 == torch.get_num_threads() < os.cpu_count()
    ):
        print(
            "One thread only: start with `accelerate launch --cpu --num_processes 1`, or set OMP_NUM_THREADS",
            flush=True,
        )

    check_model_fields(model_args)
    train, dev, texts = load_data(data_args)  # a bad row, too, should be named before a model is loaded
    teacher = Teacher(model_args.teacher, model_args.teacher_revision, cache_dir=data_args.cache_dir)
    set_seed(training_args.seed)  # the Trainer does so when the weights are drawn by then
    model = new_model(model_args, teacher).to(training_args.device)
    offset = 0

    def examples(name, queries, corpus, mode, seen=None, unchanged=None):
        return build_examples(
            model,
            teacher,
            queries,
            corpus,
            mode,
            cache_dir=data_args.cache_dir,
            online_features=data_args.online_features,
            gold_share=data_args.gold_share,
            rewrite_gold_share=data_args.rewrite_gold_share,
            target_repulsion_threshold=data_args.target_repulsion_threshold,
            rank_top_k=data_args.rank_top_k,
            num_hard_negatives=data_args.num_hard_negatives,
            id_offset=offset,
            name=name,
            seen=seen,
            unchanged=unchanged,
        )

    def modes_of(entry: str) -> list[str]:
        modes = ("context", "generated") if written(entry, data_args) else ("context",)  # the probe has its own stage
        return [mode for mode in data_args.query_modes if mode in modes]

    def dev_parts(modes_of) -> dict:
        return {
            f"{name}_{mode}": examples(name, queries, corpus, mode)
            for entry, (name, queries, corpus) in zip(data_args.dev_data, dev, strict=True)
            for mode in modes_of(entry)
        }

    train_parts, probe_parts = [], []
    weights = data_args.train_weights or [1.0] * len(train)
    for entry, weight, (name, queries, corpus) in zip(data_args.train_data, weights, train, strict=True):
        parts = {mode: examples(name, queries, corpus, mode) for mode in modes_of(entry)}
        unchanged = parts.get("context") if training_args.consistency_weight else None
        for part in parts.values():
            train_parts += [part] * max(1, round(weight))
        # What counts twice is varied twice, each time otherwise.
        for draw in range(max(1, round(weight)) if "context" in parts else 0):
            for what, (some, seen) in {
                "varied": varied(queries, data_args.augmentation_share, corpus, model.build_prompt, draw),
                "behind others": with_topic_shifts(queries, data_args.topic_shift_share, draw),
            }.items():
                if len(some):
                    train_parts.append(examples(f"{name}, {what}", some, corpus, "context", seen, unchanged))
        if "probe" in data_args.query_modes:
            some = subsample(list(range(len(queries))), data_args.max_probe_queries or len(queries))
            probe_parts.append(examples(name, queries.select(some), corpus, "probe"))
        # The modes share a corpus, and so its ids; the next data set's begin after it.
        offset += (len(corpus) if corpus is not None else 0) + len(queries)
    questions = questions_of(train) if data_args.turns_as_text else []
    # Single questions and sentences among the conversations: a vector may not drift off a text that stands alone.
    wanted = round(data_args.plain_text_share * sum(map(len, train_parts)))
    for name, some in (("plain text", texts), ("questions", questions)):
        some = subsample(some, wanted * len(some) // max(1, len(texts) + len(questions)))
        some = fits_context(some, model.build_prompt)
        if some:
            rows = [{"messages": [{"role": "user", "content": text}], "rewrite": text, "gold": []} for text in some]
            train_parts.append(examples(name, datasets.Dataset.from_list(rows), None, "context"))
            offset += len(rows)
    # All that runs the backbone comes before training, which may spread its weights over the devices.
    dev_examples = dev_parts(modes_of) or None
    training_info = {
        "backbone": model_args.backbone,
        "backbone_revision": model_args.backbone_revision,
        "teacher": model_args.teacher,
        "teacher_revision": model_args.teacher_revision,
        "train_data": {name: len(queries) for name, queries, _ in train},
        "dev_data": {name: len(queries) for name, queries, _ in dev},
        "plain_texts": len(texts),
        "turns_as_text": data_args.turns_as_text,
        "query_modes": data_args.query_modes,
        "augmentation_share": data_args.augmentation_share,
        "topic_shift_share": data_args.topic_shift_share,
        "data_license": data_args.data_license,
        "license": data_args.license,
        "device": device_name(training_args.device),
        "processes": training_args.world_size,
        "command": without_tokens(["train.py", *argv]),
    }
    if training_args.process_index == 0:
        held.enter_context(alone_in(output_dir))
        remove_checkpoints([path for path in checkpoints_of(output_dir) if not is_whole(path)])
    resume = last_whole_checkpoint(output_dir) if run_args.resume else None

    # The other stages are short: no checkpoints, and no dev metrics before they end.
    without_checks = dataclasses.replace(
        training_args,
        max_steps=-1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        push_to_hub=False,
    )
    if model.copy_path is not None and data_args.lexical_epochs and (texts or questions) and not resume:
        words = build_texts(model, teacher, [*texts, *questions], "plain texts", data_args.augmentation_share)
        print(f"Stage a: the vocabulary's vectors, from {len(words)} plain texts", flush=True)
        stage = dataclasses.replace(
            without_checks,
            num_train_epochs=data_args.lexical_epochs,
            learning_rate=data_args.lexical_learning_rate,
            token_learning_rate=data_args.lexical_learning_rate,
            per_device_train_batch_size=data_args.lexical_batch_size,
            gradient_accumulation_steps=1,
            rank_weight=0.0,
            alignment_weight=training_args.alignment_weight or 1.0,
        )
        train_only(model.copy_path.token_values, model.copy_path.token_salience, of=model)
        NativeRetrievalTrainer(model, stage, words, stage="Stage a: words").train()

    print(f"Stage b: {sum(map(len, train_parts))} examples, conversations and some plain text", flush=True)
    train_only(model.head, model.copy_path, of=model)
    trainer = NativeRetrievalTrainer(
        model,
        training_args,
        ConcatDataset(train_parts),
        dev_examples,
        training_info=training_info,
        stage="Stage b: conversations",
        processing_class=model.tokenizer,
    )
    trainer.train(resume_from_checkpoint=resume)
    if model.copy_path is not None:
        best = trainer.eval_dataset is not None and training_args.load_best_model_at_end
        if data_args.query_repulsion_threshold is not None:
            model.copy_path.novelty.threshold.data.fill_(data_args.query_repulsion_threshold)
        elif best and not trainer.is_fsdp_enabled:
            print(
                f"HistoryRepulsion: away from turns over a cosine of {choose_novelty_threshold(trainer):.2f}",
                flush=True,
            )
    if trainer.eval_dataset is not None:
        trainer.log_metrics("dev", trainer.evaluate())

    if probe_parts:
        print(f"Stage c: the probe, on {sum(map(len, probe_parts))} examples", flush=True)
        train_only(model.probe, of=model)
        history, eval_dataset = trainer.state.log_history, dev_parts(lambda entry: ["probe"]) or None
        stage = dataclasses.replace(
            without_checks, num_train_epochs=data_args.probe_epochs, learning_rate=data_args.probe_learning_rate
        )
        trainer = NativeRetrievalTrainer(
            model,
            stage,
            ConcatDataset(probe_parts),
            eval_dataset,
            training_info=training_info,
            stage="Stage c: the probe",
            processing_class=model.tokenizer,
        )
        trainer.train()
        if eval_dataset is not None:
            trainer.log_metrics("dev", trainer.evaluate())
        trainer.state.log_history = [*history, *trainer.state.log_history]
        trainer.args = training_args  # the card tells the recipe of the main stage

    training_info["training_seconds"] = round(time.monotonic() - started, 1)
    trainer.save_model()
    trainer.create_model_card()
    if training_args.process_index == 0:
        remove_checkpoints(checkpoints_of(output_dir))  # the best of them is the saved model
    print(f"Saved to {output_dir}. Judge it: python eval.py --model {output_dir} --data ... --split test", flush=True)
    if training_args.push_to_hub:
        try:
            commit = trainer.push_to_hub()
        except Exception as error:  # the Hub's client raises errors of four libraries
            repository = training_args.hub_model_id or "REPO"
            raise ValueError(
                f"the model is in {output_dir}, but could not be pushed: {error}. To push it, without training again: "
                f"python -m native_retrieval.card {output_dir} --push_to_hub {repository}"
            ) from error
        if commit:
            print(f"Pushed: {commit.commit_url}")


def command(argv: list[str]) -> int:
    """`main` from the command line: returns the exit code, 0, or 2 after one line on stderr."""
    try:
        main(argv)
    except (ValueError, OSError, FloatingPointError) as error:
        if "--debug_errors" in argv:
            raise
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

    import torch

    if torch.distributed.is_initialized():  # its threads may abort a process that ends before them
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(command(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted; the same command with --resume goes on")
