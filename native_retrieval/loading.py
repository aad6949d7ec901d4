"""A trained model from its folder or the Hub, with one clear line for everything that can be wrong with it."""

import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from configuration_native_retrieval import NativeRetrievalConfig
from modeling_native_retrieval import NativeRetrievalModel

from .cache import is_damaged


def model_folder(name_or_path: str | os.PathLike) -> Path:
    """
    The folder of a saved model, fetched from the Hub if it is not here. Its weights are read once, for their checksums.

    Raises:
        `ValueError`: in one line, if there is none, it is one of another kind, or its weights are not as they were saved.
    """
    try:
        folder = Path(name_or_path if Path(name_or_path).is_dir() else snapshot_download(str(name_or_path)))
        config, _ = NativeRetrievalConfig.get_config_dict(str(folder))
    except (ValueError, OSError) as error:
        raise _not_loaded(name_or_path, error) from error
    # From a directory of another kind, or without a config, a huge random model would be made.
    if (seen := config.get("model_type")) != (wanted := NativeRetrievalConfig.model_type):
        raise ValueError(
            f"model {name_or_path} holds a model of type {seen!r}, wanted {wanted!r}; "
            "name a directory that train.py wrote"
        )
    for weights in sorted(folder.glob("*.safetensors")):
        if is_damaged(weights):
            raise ValueError(
                f"model {name_or_path}: {weights.name} is not as it was saved (another checksum than in "
                f"{weights.name}.sha256); copy it again, or remove that file if you have changed the weights yourself"
            )
    return folder


def share_keys_among_heads() -> None:
    """
    Has transformers leave the sharing of keys to the attention kernel (grouped-query attention) where there is a mask, as
    behind a cache: a probe's pass then takes a third less at 4,096 tokens. On an accelerator its fastest kernels would be lost.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")


def load_model(name_or_path: str | os.PathLike) -> NativeRetrievalModel:
    """
    A model that train.py wrote, in eval mode, on the GPU if there is one.

    Raises:
        `ValueError`: in one line, if there is none, it cannot be read, its weights are not as they were saved, or it does
            not say which teacher it speaks for.
    """
    folder = model_folder(name_or_path)
    try:
        model = NativeRetrievalModel.from_pretrained(str(folder))
        # Loaded when first read: a damaged one is found before the work begins.
        model.tokenizer, model.teacher_tokenizer  # noqa: B018
    except Exception as error:  # of a damaged file, each library raises whatever its authors chose
        raise _not_loaded(name_or_path, error) from error
    if not model.config.teacher_fingerprint or not model.config.teacher_name_or_path:
        raise ValueError(
            f"model {name_or_path} does not say which teacher it was trained towards (teacher_name_or_path, "
            "teacher_fingerprint); train it with train.py"
        )
    if model.probe is not None:
        share_keys_among_heads()
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _not_loaded(name_or_path: str | os.PathLike, error: Exception) -> ValueError:
    where = "" if Path(name_or_path).exists() else "is no directory, and as a Hub id "
    reason = " ".join(str(error).split()).rstrip(".")
    return ValueError(f"model {name_or_path} {where}cannot be loaded ({reason}); name a directory that train.py wrote")


def load_head(folder: str | os.PathLike) -> NativeRetrievalModel:
    """A saved model without its backbone, whose weights are not read: it takes hidden states, as in training."""
    folder = model_folder(folder)
    config = NativeRetrievalConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = NativeRetrievalModel(config)
    state = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            state |= {k: weights.get_tensor(k) for k in weights.keys() if not k.startswith("backbone.")}  # noqa: SIM118
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    wrong = [*unexpected, *(key for key in missing if not key.startswith("backbone."))]
    if wrong:
        raise ValueError(
            f"{folder} holds the head of another version of this project ({wrong[0]} does not fit); train it again, or "
            "install the version that wrote it"
        )
    model._tokenizer_source = (str(folder), {})
    model.tokenizer, model.teacher_tokenizer  # noqa: B018, read now, and not in the first request
    return model.eval()
