"""A trained model from its folder or the Hub, with one clear line for everything that can be wrong with it."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from configuration_native_retrieval import NativeRetrievalConfig
from modeling_native_retrieval import NativeRetrievalModel


def load_model(name_or_path: str) -> NativeRetrievalModel:
    """
    A model that train.py wrote, in eval mode, on the GPU if there is one.

    Raises:
        `ValueError`: in one line, if there is none, it cannot be read, or it does not say which teacher it speaks for.
    """
    wanted = NativeRetrievalModel.config_class.model_type
    try:
        config, _ = NativeRetrievalModel.config_class.get_config_dict(name_or_path)
        # Looked at first: from a directory of another kind, or without a config, a huge random model would be made.
        seen = config.get("model_type")
        if seen == wanted:
            model = NativeRetrievalModel.from_pretrained(name_or_path)
            model.tokenizer  # noqa: B018, loaded when first read: a damaged one is found before the work begins
    except (ValueError, OSError, SafetensorError) as error:
        where = "" if Path(name_or_path).exists() else "is no directory, and "
        raise ValueError(f"model {name_or_path} {where}cannot be loaded: {error}") from error
    if seen != wanted:
        raise ValueError(
            f"model {name_or_path} holds a model of type {seen!r}, wanted {wanted!r}; "
            "name a directory that train.py wrote"
        )
    if not model.config.teacher_fingerprint or not model.config.teacher_name_or_path:
        raise ValueError(
            f"model {name_or_path} does not say which teacher it was trained towards (teacher_name_or_path, "
            "teacher_fingerprint); train it with train.py"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_head(folder: str | os.PathLike) -> NativeRetrievalModel:
    """A saved model without its backbone, whose weights are not read: it takes hidden states, as in training."""
    config = NativeRetrievalConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = NativeRetrievalModel(config)
    state = {}
    for path in Path(folder).glob("*.safetensors"):
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
    model.tokenizer  # noqa: B018, read now, and not in the first request
    return model.eval()
