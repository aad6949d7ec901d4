"""A trained model from its folder or the Hub, with one clear line for everything that can be wrong with it."""

import json
import os
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from configuration_native_retrieval import NativeRetrievalConfig
from modeling_native_retrieval import NativeRetrievalModel

from .cache import is_damaged
from .names import check_model_name

LOCAL = "_local.json"  # where backbone and teacher are on this machine; files that start with `_` are never pushed


def model_folder(name_or_path: str | os.PathLike) -> Path:
    """
    The folder of a saved model, fetched from the Hub if it is not here. Its weights are read once, for their checksums.

    Raises:
        `ValueError`: in one line, if there is none, it is one of another kind, or its weights are not as they were saved.
    """
    check_model_name(str(name_or_path))
    try:
        folder = Path(name_or_path if Path(name_or_path).is_dir() else snapshot_download(str(name_or_path)))
        config, _ = NativeRetrievalConfig.get_config_dict(str(folder))
    except (ValueError, OSError) as error:
        raise _not_loaded(name_or_path, error) from error
    # From a folder of another kind, or without a config, a random model would be made.
    if (seen := config.get("model_type")) != (wanted := NativeRetrievalConfig.model_type):
        raise ValueError(
            f"model {name_or_path} holds a model of type {seen!r}, wanted {wanted!r}; name a folder that train.py wrote"
        )
    for weights in sorted(folder.rglob("*.safetensors")):
        if is_damaged(weights):
            raise ValueError(
                f"model {name_or_path}: {weights.name} is not as it was saved (another checksum than in "
                f"{weights.name}.sha256); copy it again, or remove that file if you have changed the weights yourself"
            )
    return folder


def load_model(name_or_path: str | os.PathLike, **kwargs) -> NativeRetrievalModel:
    """
    A model that train.py wrote, in eval mode, on the GPU if there is one. `kwargs` are those of `from_pretrained`.

    Raises:
        `ValueError`: in one line, if there is none, it cannot be read, its weights are not as they were saved, or it does
            not say which teacher it was trained towards.
    """
    folder = model_folder(name_or_path)
    options = {} if not float32_is_faster() else {"dtype": torch.float32}
    backbone = local_paths(folder).get("backbone")
    if backbone and not (folder / "backbone").is_dir():
        options["backbone"] = backbone
    try:
        model = NativeRetrievalModel.from_pretrained(str(folder), **(options | kwargs))
    except Exception as error:  # of a damaged file, each library raises whatever its authors chose
        raise _not_loaded(name_or_path, error) from error
    if not model.config.teacher_fingerprint or not model.config.teacher_name_or_path:
        raise ValueError(
            f"model {name_or_path} does not say which teacher it was trained towards (teacher_name_or_path, "
            "teacher_fingerprint); train it with train.py"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_head(name_or_path: str | os.PathLike) -> NativeRetrievalModel:
    """A saved model without its backbone, whose weights are not read: it takes hidden states, as in training."""
    folder = model_folder(name_or_path)
    try:
        return NativeRetrievalModel.from_pretrained(str(folder), backbone=False).eval()
    except Exception as error:
        raise _not_loaded(name_or_path, error) from error


def local_paths(folder: str | os.PathLike) -> dict[str, str]:
    """The folders of `backbone` and `teacher` that a model was trained with, as far as they are on this machine."""
    path = Path(folder, LOCAL)
    paths = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: path for name, path in paths.items() if os.path.isdir(path)}


def float32_is_faster() -> bool:
    """Whether this machine has no accelerator, and a processor that computes in bfloat16 five times more slowly."""
    if torch.accelerator.is_available():
        return False
    flags = Path("/proc/cpuinfo")
    return not (flags.is_file() and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags.read_text(errors="replace")))


def _not_loaded(name_or_path: str | os.PathLike, error: Exception) -> ValueError:
    where = "" if Path(name_or_path).exists() else "is no folder, and as a Hub id "
    reason = " ".join(str(error).split()).rstrip(".")
    return ValueError(f"model {name_or_path} {where}cannot be loaded ({reason}); name a folder that train.py wrote")
