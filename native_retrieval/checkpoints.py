"""What a training leaves: checkpoints of the head alone, the model, its card; and where it goes on after a stop."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate.utils import save_fsdp_optimizer
from filelock import FileLock, Timeout
from huggingface_hub import CommitInfo
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from .arguments import NativeRetrievalTrainingArguments, RunArguments
from .cache import atomic_write, seal, sha256
from .card import push_model, write_model_card

SECONDS_NAME = "training_seconds"  # of a checkpoint: what it took to get there
RECIPE = (
    *("alignment_weight", "contrastive_weight", "rank_weight", "consistency_weight"),
    *("contrastive_temperature", "rank_temperature", "learning_rate", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "num_train_epochs", "warmup_steps", "weight_decay", "seed"),
)  # what the card says of the training's settings


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: `trainer_state.json` comes last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that was written to its end; what a stopped run has left unfinished is passed over."""
    return next((path for path in reversed(checkpoints_of(output_dir)) if is_whole(path)), None)


def remove_checkpoints(output_dir: Path, resumed: str | None = None) -> None:
    """
    Removes the checkpoints in a folder; but not the whole ones if the training goes on from one of them.

    Stopped half-way, it leaves none that seems whole but lacks its weights, or those of its best.
    """
    keeps = resumed is not None and Path(resumed).resolve().parent == output_dir.resolve()
    checkpoints = [path for path in checkpoints_of(output_dir) if not (keeps and is_whole(path))]
    for checkpoint in reversed(checkpoints):
        (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint, ignore_errors=True)


def is_finished(output_dir: Path) -> bool:
    """Whether a folder holds a model with its card, which comes last, and no checkpoint to go on from."""
    files = [output_dir / name for name in ("config.json", "training.json")]
    return all(path.exists() for path in files) and last_whole_checkpoint(output_dir) is None


def checkpoint_to_resume(output_dir: Path, run: RunArguments, training: NativeRetrievalTrainingArguments) -> str | None:
    """
    The checkpoint that a training goes on from, or `None` for a new one: `--resume` takes the last whole one in
    `output_dir`, if there is one, and `--resume_from_checkpoint` the one that it names.

    Raises:
        `ValueError`: in one line, if that is not whole, or if a model or another training would be lost.
    """
    wanted = training.resume_from_checkpoint or ""
    left = checkpoint = last_whole_checkpoint(output_dir)
    resume = run.resume or wanted.lower() == "true"  # as transformers' own examples have it
    if wanted.lower() not in ("", "true", "false"):
        checkpoint, resume = Path(wanted), True
        if not is_whole(checkpoint):
            raise ValueError(
                f"resume_from_checkpoint {wanted} is no whole checkpoint (its {TRAINER_STATE_NAME} is missing or damaged); "
                "name a checkpoint-N folder, or take the last one with --resume"
            )
    is_ours = resume and checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    if left and not is_ours and not run.overwrite_output_dir:
        raise ValueError(
            f"{left} is of a training that was stopped; go on from it with --resume, train into another --output_dir, or "
            "start again with --overwrite_output_dir"
        )
    if (output_dir / "config.json").exists() and not is_ours and not run.overwrite_output_dir:
        raise ValueError(
            f"output_dir {output_dir} holds a model; train into another --output_dir, or replace it with "
            "--overwrite_output_dir"
        )
    return str(checkpoint) if resume and checkpoint else None


def write_local_paths(output_dir: Path, **sources: str) -> None:
    """
    Notes where backbone and teacher are on this machine, in `_local.json`, which is never pushed; see `loading.py`.

    The model's own configuration holds the name of a local folder only.
    """
    paths = {name: str(Path(source).resolve()) if Path(source).exists() else source for name, source in sources.items()}
    with atomic_write(output_dir / "_local.json") as partial:
        partial.write_text(json.dumps(paths, indent=2) + "\n")


@contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """
    A lock on a directory that two trainings would spoil for each other. One that was left empty is removed.

    Raises:
        `ValueError`: if another training holds it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / "_training.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another training is writing to output_dir {output_dir}; wait for its end, or name another with --output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()
        if [path.name for path in output_dir.iterdir()] == ["_training.lock"]:
            shutil.rmtree(output_dir)


@contextmanager
def kept_encoder(model, args, texts, cache_dir: str | os.PathLike) -> Iterator[bool]:
    """
    Loads the word encoder that an earlier run has trained on the same texts with the same settings, and yields whether there
    was one. If not, it keeps what the block trains.
    """
    encoder, digest = model.query_head.encoder, hashlib.sha256()
    settings = (args.learning_rate, args.code_learning_rate, args.num_train_epochs, args.per_device_train_batch_size)
    settings += (
        args.world_size,
        args.seed,
        args.bf16,
        args.alignment_weight,
        args.weight_decay,
        args.lr_scheduler_type,
    )
    digest.update(repr((settings, *((name, *weight.shape) for name, weight in encoder.named_parameters()))).encode())
    for sequence in texts.sequences:
        digest.update(np.asarray(sequence, dtype=np.int32).tobytes() + b"|")
    digest.update(np.ascontiguousarray(texts.targets[:1000]).tobytes())
    path = Path(cache_dir) / f"encoder-{digest.hexdigest()[:24]}.safetensors"
    if is_kept := path.is_file():
        encoder.load_state_dict(safetensors.torch.load_file(path))
        print(f"Word encoder: taken from {path}, trained before on the same texts")
    yield is_kept
    if not is_kept and args.process_index == 0:
        with _room_for(f"the word encoder {path}"), atomic_write(path) as partial:
            safetensors.torch.save_file(
                {name: weight.detach().cpu() for name, weight in encoder.state_dict().items()}, partial
            )


class HeadCheckpoints(Trainer):
    """
    A Trainer whose checkpoints hold the head alone, as the backbone never changes. `save_model` saves the whole model.

    Attributes:
        started (`float`): when the work began that `training_seconds` counts, by `time.monotonic()`.
        training_info (`dict`): what the model card says of data and recipe.
    """

    started: float
    training_info: dict
    _seconds_before = 0.0  # in the runs that this one goes on from

    @property
    def training_seconds(self) -> float:
        """Seconds that the training has taken, those before its interruptions included."""
        return round(self._seconds_before + time.monotonic() - self.started, 1)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves a whole model, or a checkpoint of the head.

        Stopped at any moment, the folder holds the model of before, or one without a `config.json`, which nothing takes
        for a model, or the new one.
        """
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call and output_dir is not None:
            return self._save_head(folder)
        aside = folder / "_saving"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.unwrap_model(self.model).set_reference()  # by all devices, which may each have a part of it
        with _room_for(f"the model {folder}"):
            super().save_model(str(aside), _internal_call=True)  # a push is a step of its own
        if self.args.should_save:
            (aside / "training_args.bin").unlink(missing_ok=True)  # a pickle, and with the Hub's token in it
            for weights in aside.rglob("*.safetensors"):
                seal(weights, sha256(weights))
            _replace_model(aside, folder)

    def _save_head(self, folder: Path) -> None:
        if self.is_deepspeed_enabled:
            super().save_model(str(folder), _internal_call=True)
        else:
            state = self.accelerator.unwrap_model(self.model).state_dict()
            state = {k: v for k, v in state.items() if not k.startswith("backbone.")}
            # Under FSDP each device has a part of a weight, and all of them take part in putting it together.
            state = {k: (v.full_tensor() if isinstance(v, DTensor) else v).contiguous() for k, v in state.items()}
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                safetensors.torch.save_file(state, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        if self.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)
            (folder / SECONDS_NAME).write_text(f"{self.training_seconds}\n")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        sharded = type(model)
        if isinstance(model, FSDPModule):  # FSDP's class, whose name and code would be saved for the model's
            model.__class__ = sharded.__bases__[-1]
        try:
            super()._save(output_dir, state_dict)
        finally:
            model.__class__ = sharded

    def _save_checkpoint(self, model, trial):
        with _room_for(f"the checkpoint of step {self.state.global_step} in {self.args.output_dir}"):
            super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # As in transformers, without the whole model beside them.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        seconds = Path(resume_from_checkpoint, SECONDS_NAME)
        self._seconds_before = float(seconds.read_text()) if seconds.exists() else 0.0
        if self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_head(resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        self._load_head(self.state.best_model_checkpoint)

    def _load_head(self, checkpoint: str) -> None:
        path = Path(checkpoint) / SAFE_WEIGHTS_NAME
        try:
            state = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"checkpoint {path} cannot be read ({error}); resume from an older one") from error
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled:
            options = StateDictOptions(full_state_dict=True, strict=False)
            missing, unexpected = set_model_state_dict(model, state, options=options)
        else:
            try:
                missing, unexpected = model.load_state_dict(state, strict=False)
            except RuntimeError as error:  # another shape
                raise ValueError(f"checkpoint {path} is of another head ({' '.join(str(error).split())})") from error
        missing = [key for key in missing if not key.startswith("backbone.")]
        if missing or unexpected:
            raise ValueError(
                f"checkpoint {path} is of another head (missing {missing[:3]}, unexpected {unexpected[:3]}); "
                "use the configuration it was trained with, or another output_dir"
            )

    def create_model_card(self, *args, **kwargs) -> None:
        """Writes `training.json` and the card, `README.md`, beside the saved model."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        training_info = {
            **self.training_info,
            "recipe": {name: getattr(self.args, name) for name in RECIPE},
            "dev": [entry for entry in self.state.log_history if any(key.startswith("eval_") for key in entry)],
            "history": [entry for entry in self.state.log_history if "loss" in entry],
            "repository": self.args.hub_model_id,
            "training_seconds": self.training_seconds,
        }
        (folder / "training.json").write_text(json.dumps(training_info, indent=2) + "\n")
        write_model_card(folder)

    def push_to_hub(
        self, commit_message: str | None = None, blocking: bool = True, token: str | None = None, **kwargs
    ) -> CommitInfo | None:
        """
        Pushes what `save_model` and `create_model_card` have left; see [`card.push_model`], which waits until all is sent.

        Raises:
            `ValueError`: in one line, if that fails. The model stays in `output_dir`.
        """
        if not self.is_world_process_zero():
            return None
        folder = self.args.output_dir
        repository = self.args.hub_model_id or Path(folder).absolute().name
        try:
            commit = push_model(
                folder,
                repository,
                token=token or self.args.hub_token,
                private=self.args.hub_private_repo,
                revision=self.args.hub_revision,
                commit_message=commit_message or "End of training",
            )
        except Exception as error:  # the Hub's client raises errors of four libraries
            raise ValueError(
                f"the model is in {folder}, but could not be pushed: {' '.join(str(error).split())}. To push it, without "
                "training again: "
                f"python -m native_retrieval.card {folder} --push_to_hub {repository}"
            ) from error
        print(f"Pushed: {commit.commit_url}")
        return commit


@contextmanager
def _room_for(what: str) -> Iterator[None]:
    """A full disk comes as the error of whichever library was writing."""
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"{what} could not be written ({reason}); free some space, and --resume goes on") from error


def _replace_model(new: Path, folder: Path) -> None:
    """Moves a saved model's files in the place of another's. `config.json`, which makes it a model, goes first and comes last."""
    (folder / "config.json").unlink(missing_ok=True)
    for weights in folder.glob("model*.safetensors*"):  # another number of files would leave some of them
        weights.unlink()
    for name in ("backbone", "word_tokenizer"):  # of a model that had them
        shutil.rmtree(folder / name, ignore_errors=True)
    for part in sorted(new.iterdir(), key=lambda part: part.name == "config.json"):
        if part.is_dir():
            shutil.rmtree(folder / part.name, ignore_errors=True)
        os.replace(part, folder / part.name)
    new.rmdir()
