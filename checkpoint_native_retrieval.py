# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""Load and save: the head at the root of a folder, the backbone as an ordinary checkpoint in `backbone/`, the processor.

Everything is read before `from_pretrained` returns. Ships to the Hub; imports torch and transformers only.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

try:  # on the Hub these files form a package; in the repository they are plain modules
    from .processing_native_retrieval import NativeRetrievalProcessor
except ImportError:
    from processing_native_retrieval import NativeRetrievalProcessor

logger = logging.get_logger(__name__)

BACKBONE = "backbone"  # a sub-folder with an ordinary checkpoint
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
BACKBONE_ARGUMENTS = ("dtype", "torch_dtype", "device_map", "max_memory", "offload_folder", "offload_buffers")
BACKBONE_ARGUMENTS += ("attn_implementation", "quantization_config", "low_cpu_mem_usage")
# Its vector is stored with the weights and computed again at load.
REFERENCE = [
    {"role": "user", "content": "Who painted Guernica?"},
    {"role": "assistant", "content": "Pablo Picasso painted it in 1937."},
    {"role": "user", "content": "Where does it hang today?"},
]


class ComposedModel(PreTrainedModel):
    """A head, a backbone and a processor in one folder. What they compute is the business of the class that extends it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, backbone: Any = None, **kwargs):
        """
        As in transformers. `dtype`, `device_map`, `max_memory`, `attn_implementation` and `quantization_config` concern the
        backbone; the head stays in float32. Everything is read before it returns.

        Args:
            backbone (*optional*): a path, Hub id or loaded model instead of the stored one; `False` loads the head alone.
        """
        path, own = pretrained_model_name_or_path, {k: kwargs.pop(k) for k in BACKBONE_ARGUMENTS if k in kwargs}
        hub = {k: kwargs[k] for k in HUB_ARGUMENTS if kwargs.get(k) is not None}
        subfolder = kwargs.get("subfolder") or ""
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, subfolder, "config.json")):
            raise OSError(f"{os.path.join(path, subfolder)} has no config.json; give the folder of a saved model")
        _refuse_pointers(os.path.join(path, subfolder))
        loaded = super().from_pretrained(path, *args, dtype=torch.float32, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # With a config at hand, the tokenizers' loader does not ask about this repository's code once more.
        model.processor = NativeRetrievalProcessor.from_pretrained(
            path, config=model.config, subfolder=subfolder, **hub
        )
        read, wanted = len(model.processor.word_tokenizer), model.config.word_vocab_size
        if wanted not in (None, read):  # without one, transformers takes another
            raise OSError(f"{path}: word_tokenizer has {read} tokens, this head needs {wanted}; copy the folder again")
        if backbone is False:
            return loaded
        if not isinstance(backbone, PreTrainedModel):
            if backbone is None and model.config.store_backbone:
                backbone, own["subfolder"] = path, os.path.join(subfolder, BACKBONE)
                own["trust_remote_code"] = kwargs.get("trust_remote_code")
            else:
                hub["revision"] = None if backbone else model.config.backbone_revision
                backbone = backbone or model.config.backbone_name_or_path
            own = {k: v for k, v in {**hub, **own}.items() if v is not None}
            source = os.path.join(backbone, own.get("subfolder", ""))
            if os.path.isdir(source):  # of a local sub-folder, transformers reads the generation settings at the root
                backbone, own["subfolder"] = source, ""
                _refuse_pointers(source)
            try:
                backbone = AutoModelForCausalLM.from_pretrained(backbone, **own)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise OSError(f"backbone {source!r} cannot be loaded ({reason}); give backbone='path'") from error
        model._set_backbone(backbone)
        model._check_reference()
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        As in transformers: the head's weights, the configuration, the processor and the code at the root; the backbone as
        an ordinary checkpoint, with its tokenizer, in `backbone/`, unless `store_backbone` is False.
        """
        if kwargs.pop("push_to_hub", False):  # transformers would push before the tokenizers are written
            names = ("commit_message", "private", "token", "revision", "create_pr")
            hub = {name: kwargs.pop(name) for name in names if name in kwargs}
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.save_pretrained(save_directory, *args, **kwargs)
            return self.push_to_hub(repo_id, **hub)
        if kwargs.get("is_main_process", True):  # train.py's checksums are of the weights that are replaced now
            for pattern in ("*.safetensors.sha256", f"{BACKBONE}/*.safetensors.sha256"):
                for checksum in Path(save_directory).glob(pattern):
                    checksum.unlink()
        given = kwargs.pop("state_dict", None)
        if given is None and self.backbone is not None and self.processor is not None:
            self.set_reference()
        state, own = given or self.state_dict(), f"{BACKBONE}."
        head = {name: _compact(weight) for name, weight in state.items() if not name.startswith(own)}
        # transformers refuses to write some generation settings that it has read; they are the backbone's, as they are.
        settings, self.generation_config = self.generation_config, GenerationConfig()
        try:
            super().save_pretrained(save_directory, *args, state_dict=head, **kwargs)
        finally:
            self.generation_config = settings
        if not kwargs.get("is_main_process", True) or self.processor is None:
            return
        self.processor.save_pretrained(save_directory)
        settings.to_json_file(os.path.join(save_directory, "generation_config.json"))
        if self.backbone is not None and self.config.store_backbone:
            folder = os.path.join(save_directory, BACKBONE)
            weights = {n.removeprefix(own): w for n, w in state.items() if n.startswith(own)} if given else None
            view = copy.copy(self.backbone)
            view.generation_config = GenerationConfig()
            view.save_pretrained(folder, *args, state_dict=weights, **kwargs)
            self.backbone.generation_config.to_json_file(os.path.join(folder, "generation_config.json"))
            self.tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def set_reference(self) -> None:
        """Stores the vector of one fixed conversation, so that loading can tell whether it still comes out."""
        self.reference_embedding.copy_(self._reference())

    def _reference(self) -> torch.Tensor:
        training = self.training
        input_ids, mask = self.processor.pad([self.processor.encode(REFERENCE)])
        vector = self.eval()(input_ids.to(self._device()), mask.to(self._device())).query_embeddings[0]
        self.train(training)
        return vector

    @torch.no_grad()
    def _check_reference(self) -> None:
        cosine = float(F.cosine_similarity(self.reference_embedding.cpu(), self._reference().cpu(), dim=0))
        quantized = getattr(self.backbone, "hf_quantizer", None) is not None
        if not cosine > (0.9 if quantized else 0.9999):
            logger.warning(
                f"A fixed conversation's vector has a cosine of {cosine:.4f} to the one stored with this model, wanted 1. "
                "Weights, backbone, tokenizer or libraries are not those of its training; queries will find less."
            )

    def __reduce__(self):
        # transformers puts local functions into a backbone at its first pass, and no pickle takes these.
        parts, backbone = None, self.backbone
        if backbone is not None:  # unsaved buffers, such as angles of positions, have a precision of their own
            tensors = backbone.state_dict(), dict(backbone.named_buffers())
            parts = (type(backbone), backbone.config, backbone.generation_config, *tensors)
        head = {n: w for n, w in self.state_dict().items() if not n.startswith(f"{BACKBONE}.")}
        return _unpickled, (type(self), self.config, self.processor, head, parts, self.training)

    def __deepcopy__(self, memo: dict) -> "ComposedModel":
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin


def _compact(weight: torch.Tensor) -> torch.Tensor:
    """The same numbers in half of the bytes, if bfloat16 holds them exactly: those of a head that train.py has rounded."""
    half = weight.bfloat16()
    return half if weight.dtype == torch.float32 and bool((half == weight).all()) else weight


def _refuse_pointers(folder: str) -> None:
    """Raises `OSError` if a local folder holds Git LFS's pointers in the place of its files."""
    for path in (*Path(folder).glob("*.*"), *Path(folder).glob("word_tokenizer/*.*")):
        if path.is_file() and path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise OSError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def _unpickled(cls, config, processor, head: dict, parts: tuple | None, training: bool) -> "ComposedModel":
    with torch.device("meta"):
        model = cls(config, None, processor)
        backbone = parts and parts[0](parts[1])
    model.load_state_dict(head, assign=True)
    if parts is not None:
        _, _, backbone.generation_config, weights, buffers = parts
        backbone.load_state_dict(weights, assign=True)
        backbone.tie_weights()
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(owner), leaf, buffer)
        model._set_backbone(backbone)
    return model.train(training)


__all__ = ["ComposedModel"]
