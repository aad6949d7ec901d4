"""The arguments of train.py: model, data, this run, and training. From a YAML file and the command line, which wins."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from transformers import TrainingArguments

from .cli import Parser


@dataclass
class ModelArguments:
    """The language model, the teacher, and the head between them."""

    backbone: str = field(default="", metadata={"help": "Causal language model: path or Hub id."})
    backbone_revision: str | None = field(default=None, metadata={"help": "Pins a backbone from the Hub."})
    teacher: str = field(
        default="", metadata={"help": "The index's embedding model: sentence-transformers path or Hub id."}
    )
    teacher_revision: str | None = field(default=None, metadata={"help": "Pins a teacher from the Hub."})
    store_backbone: bool = field(default=True, metadata={"help": "Save the backbone's weights with the head."})
    query_mode: str = field(default="context", metadata={"help": "Default mode of the saved model."})
    query_prompt: str = field(default="Search query:", metadata={"help": "How the assistant begins a written query."})
    num_context_tokens: int = field(default=16, metadata={"help": "Last tokens of the prompt that the head reads."})
    max_query_tokens: int = field(default=32, metadata={"help": "Longest written query, in tokens."})
    max_prompt_tokens: int | None = field(default=1024, metadata={"help": "Longest prompt; older turns are dropped."})
    read_words: bool = field(
        default=True, metadata={"help": "The head reads the conversation's words; false gives the paper's head."}
    )
    selection_heads: list[str] | None = field(
        default=None,
        metadata={
            "help": "Attention heads of the backbone that choose earlier words, as LAYER.HEAD, counted from 0 (default: the "
            "best 8 on the rewrites of train_data)."
        },
    )
    encoder_dim: int = field(default=384, metadata={"help": "Width of the word encoder."})
    encoder_num_layers: int = field(default=2, metadata={"help": "Its layers."})
    encoder_code_dim: int = field(default=192, metadata={"help": "Numbers that stand for a piece of a word in it."})
    head_num_layers: int = field(default=0, metadata={"help": "Layers of the projection head; 0: none."})
    head_dim: int = field(default=384, metadata={"help": "Its width."})
    head_num_attention_heads: int = field(default=8, metadata={"help": "Its attention heads."})
    head_dropout: float = field(default=0.1, metadata={"help": "Its dropout."})
    hidden_state_layers: list[int] | None = field(
        default=None, metadata={"help": "Layers that the head reads (default: those that it needs)."}
    )

    def __post_init__(self) -> None:
        if not self.read_words and not self.head_num_layers:
            raise ValueError("read_words is false and head_num_layers 0: the head would read nothing; change one")
        for head in self.selection_heads or ():
            if not re.fullmatch(r"\d+\.\d+", str(head)):
                raise ValueError(f"selection_heads has {head!r}, wanted LAYER.HEAD, such as 21.5")

    @property
    def config_fields(self) -> dict:
        """Fields of `NativeRetrievalConfig`."""
        others = ("backbone", "teacher", "max_prompt_tokens", "read_words", "selection_heads")
        given = {name: value for name, value in vars(self).items() if name not in others and value is not None}
        if self.selection_heads:
            given["selection_heads"] = [list(map(int, str(head).split("."))) for head in self.selection_heads]
        return given if self.read_words else given | {"word_vocab_size": None}


@dataclass
class DataArguments:
    """Conversations with relevant documents, plain text, and the targets made of them."""

    train_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders or Hub ids in the BEIR layout with messages, each as NAME or NAME:SPLIT (train)."},
    )
    dev_data: list[str] = field(
        default_factory=list, metadata={"help": "The same, to choose the checkpoint: NAME or NAME:SPLIT (dev)."}
    )
    train_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Passes over each of train_data in an epoch (default: 1), in whole numbers; each pass is augmented "
            "differently. Below 1: this share of its queries, the first."
        },
    )
    query_modes: list[str] = field(
        default_factory=lambda: ["context"], metadata={"help": "Modes to train: context, generated."}
    )
    generated_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Train and judge the generated mode on these entries of train_data and dev_data only."},
    )
    plain_text: list[str] = field(default_factory=list, metadata={"help": "Text files or corpora to learn from."})
    num_plain_texts: int = field(default=100_000, metadata={"help": "Sentences taken of them, evenly spaced."})
    turns_as_text: bool = field(
        default=True, metadata={"help": "User turns and rewrites of train_data are plain texts too."}
    )
    lexical_epochs: int = field(
        default=2, metadata={"help": "Training of the word encoder: passes over the plain texts (0: none)."}
    )
    lexical_learning_rate: float = field(default=5e-4, metadata={"help": "Its peak learning rate."})
    lexical_batch_size: int = field(default=512, metadata={"help": "Its texts in a step, for each device."})
    plain_text_share: float = field(
        default=0.25, metadata={"help": "Plain texts among the conversations, as a share of these."}
    )
    augmentation_share: float = field(
        default=0.2,
        metadata={
            "help": "Share of the training queries that are also seen with typos, or with what agents put around a "
            "conversation: system prompts, tools, half turns."
        },
    )
    topic_shift_share: float = field(
        default=0.5,
        metadata={
            "help": "Share of the conversations that are also seen after 1 to 20 turns of others: the head learns to "
            "ignore an earlier topic."
        },
    )
    gold_share: float = field(
        default=0.5, metadata={"help": "How far the target of a query without a rewrite moves to its document, 0 to 1."}
    )
    rewrite_gold_share: float = field(default=0.2, metadata={"help": "The same of a query with a rewrite."})
    rank_top_k: int = field(default=128, metadata={"help": "Documents of the teacher's ranking to distil."})
    num_hard_negatives: int = field(default=0, metadata={"help": "Hard negatives of a query, from that ranking."})
    max_train_queries: int | None = field(default=None, metadata={"help": "Only the first queries of each data set."})
    online_features: bool = field(default=False, metadata={"help": "Run the backbone in every step; no cache on disk."})
    license: str = field(
        default="apache-2.0", metadata={"help": "The model's, for its card; the backbone's terms hold for its weights."}
    )
    data_license: str | None = field(default=None, metadata={"help": "The licences of the data, for the model card."})
    cache_dir: str = field(default=".cache/native_retrieval", metadata={"help": "Where costly results are kept."})

    def __post_init__(self) -> None:
        for name in ("augmentation_share", "topic_shift_share", "gold_share", "rewrite_gold_share"):
            _need(self, name, lambda value: 0 <= value <= 1, "0 to 1")
        for name in ("plain_text_share", "num_plain_texts", "lexical_epochs", "num_hard_negatives"):
            _need(self, name, lambda value: value >= 0, "0 or more")
        _need(self, "lexical_batch_size", lambda value: value >= 1, "at least 1")
        _need(self, "rank_top_k", lambda value: value >= 2, "at least 2: one document is no ranking")
        if self.train_weights and (len(self.train_weights) != len(self.train_data) or min(self.train_weights) <= 0):
            raise ValueError(
                f"train_weights is {self.train_weights}, wanted one number above 0 for each of the "
                f"{len(self.train_data)} entries of train_data"
            )
        for weight in self.train_weights:
            if weight > 1 and weight != round(weight):
                raise ValueError(f"train_weights has {weight:g}; above 1 give whole numbers, passes in an epoch")

    def modes_of(self, entry: str) -> list[str]:
        """The modes that an entry of train_data or dev_data is used for. The backbone writes queries for few: it is slow."""
        writes = not self.generated_data or entry in self.generated_data
        return [mode for mode in self.query_modes if mode != "generated" or writes]


@dataclass
class RunArguments:
    """How this run behaves."""

    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir, if any."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the model or the stopped training in output_dir."}
    )
    debug_errors: bool = field(default=False, metadata={"help": "Show the traceback of an error."})


@dataclass
class NativeRetrievalTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, with defaults that train a head, and the weights of its losses."""

    alignment_weight: float = field(default=2.0, metadata={"help": "Weight of the cosine distance to the target."})
    contrastive_weight: float = field(
        default=1.0, metadata={"help": "Weight of InfoNCE against the batch's documents."}
    )
    rank_weight: float = field(default=1.0, metadata={"help": "Weight of the KL to the teacher's ranking."})
    consistency_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the consistency loss: a conversation's vector should not change when unrelated context "
            "is added. Try 1."
        },
    )
    contrastive_temperature: float = field(default=0.05, metadata={"help": "Temperature of InfoNCE."})
    rank_temperature: float = field(default=0.05, metadata={"help": "Temperature of the rank distillation."})

    output_dir: str | None = field(
        default=None, metadata={"help": "Where checkpoints and the trained model go (default: trainer_output)."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the head."})
    code_learning_rate: float | None = field(
        default=None, metadata={"help": "That of the word codes (default: the same)."}
    )
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Queries in a step, for each device; also the in-batch negatives."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "The same on the dev split."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the training queries."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate after warm-up."})
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimiser."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 the share of all, of warm-up."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay, not of biases and norms."})
    train_sampling_strategy: str = field(
        default="group_by_length", metadata={"help": "group_by_length wastes little on padding; or random."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to measure retrieval on the dev split."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint (of the head alone)."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept beside the best."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "End with the best checkpoint on dev."})
    metric_for_best_model: str | None = field(default="ndcg@10", metadata={"help": "Dev metric that names the best."})
    greater_is_better: bool | None = field(
        default=None, metadata={"help": "Whether more of that metric is better (default: yes, but not of a loss)."}
    )
    logging_steps: float = field(default=20, metadata={"help": "Steps between two log lines."})
    report_to: str = field(default="none", metadata={"help": "none, tensorboard, trackio, wandb ..."})
    hub_strategy: str = field(
        default="end", metadata={"help": "When to push. Checkpoints hold the head alone, so only `end` will do."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Go on from this checkpoint folder; `--resume` takes the last one."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: batches carry vectors."})
    dataloader_pin_memory: bool = field(default=False, metadata={"help": "Pin batches in memory (for GPUs)."})

    def __post_init__(self):
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # transformers asks for it by name
        super().__post_init__()
        weights = (self.alignment_weight, self.contrastive_weight, self.rank_weight)
        if min(*weights, self.consistency_weight) < 0 or not any(weights):
            raise ValueError(
                f"loss weights {weights} and consistency_weight={self.consistency_weight} must not be negative, and at "
                "least one of the first three must be above 0"
            )
        for name in ("contrastive_temperature", "rank_temperature"):
            _need(self, name, lambda value: value > 0, "above 0")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _need(self, name, lambda value: value >= 1, "at least 1")
        if self.hub_strategy != "end":
            raise ValueError(f"hub_strategy={self.hub_strategy!r} would push checkpoints without a backbone; use 'end'")
        # Dev metrics need all vectors at once, and full_eval would round the head that is then saved.
        changed = [name for name in ("batch_eval_metrics", "bf16_full_eval", "fp16_full_eval") if getattr(self, name)]
        changed += [] if self.eval_do_concat_batches else ["eval_do_concat_batches"]
        changed += ["remove_unused_columns"] if self.remove_unused_columns else []
        if changed:
            raise ValueError(f"{changed[0]} cannot be changed in this training; leave it out")


def parse(argv: Sequence[str], manual: str = "") -> tuple[Any, ...]:
    """
    `[recipe.yaml] [--field value ...]` to an instance of each of the four groups; `manual` is what `--help` begins with.

    Raises:
        `ValueError`: in one line, for a misspelt field or a bad value.
    """
    groups = (ModelArguments, DataArguments, RunArguments, NativeRetrievalTrainingArguments)
    model, data, run, training = ([field.name for field in fields(group)] for group in groups)
    more = "gradient_accumulation_steps max_steps seed use_cpu push_to_hub hub_model_id hub_private_repo"
    titles = {
        "the model": model,
        "the data": data,
        "this run": run,
        "training (every other field of transformers' TrainingArguments works too)": [
            *(name for name in training if name in NativeRetrievalTrainingArguments.__annotations__),
            *more.split(),
        ],
    }
    usage = "%(prog)s [recipe.yaml] [--field ...]"
    return Parser(groups, titles, description=manual, prog="train.py", usage=usage).parse(argv)


def lexical_arguments(
    training: NativeRetrievalTrainingArguments, data: DataArguments
) -> NativeRetrievalTrainingArguments:
    """The training arguments of lexical pre-training: it is short, so it has no checkpoints and no dev metrics."""
    return replace(
        training,
        max_steps=-1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        push_to_hub=False,
        num_train_epochs=data.lexical_epochs,
        learning_rate=data.lexical_learning_rate,
        code_learning_rate=4 * data.lexical_learning_rate,
        per_device_train_batch_size=data.lexical_batch_size,
        gradient_accumulation_steps=1,
        contrastive_weight=0.0,
        rank_weight=0.0,
        alignment_weight=1.0,
    )


def split_source(entry: str) -> tuple[str, str]:
    """`NAME:SPLIT` to its two parts; of `NAME`, the second is empty."""
    # A drive letter is no name, and a Hub id has no colon.
    source, _, split = entry.rpartition(":") if ":" in entry[2:] else (entry, "", "")
    return source, split


def _need(arguments: object, name: str, right: Callable[[Any], bool], wanted: str) -> None:
    if not right(value := getattr(arguments, name)):
        raise ValueError(f"{name} is {value}, wanted {wanted}")
