# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""The query route of a sentence-transformers model: a `NativeRetrievalModel` where others have a second encoder.

`native_retrieval.export` puts this file beside the two model files into the folder that it writes.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule

try:  # in an exported folder the three files form a package; in the repository they are plain modules
    from .modeling_native_retrieval import NativeRetrievalModel
except ImportError:
    from modeling_native_retrieval import NativeRetrievalModel


class NativeQuery(InputModule):
    """Strings or conversations (lists of `{"role", "content"}` messages) to unit vectors in the teacher's space."""

    save_in_root = False

    def __init__(self, model: NativeRetrievalModel):
        super().__init__()
        self.model = model

    @property
    def modalities(self) -> list[str]:
        return ["text", "message"]

    @property
    def tokenizer(self):
        return self.model.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens of a prompt at most; the oldest turns are dropped beyond it."""
        return self.model.config.max_prompt_tokens

    def get_embedding_dimension(self) -> int:
        return self.model.config.embedding_dim

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs) -> dict[str, torch.Tensor]:
        """Prompts, padded on the left, `(batch, tokens)`. A `prompt` goes before the last turn."""
        conversations = [
            [{"role": "user", "content": text}] if isinstance(text, str) else list(text) for text in inputs
        ]
        if prompt:
            for conversation in conversations:
                conversation[-1] = {**conversation[-1], "content": prompt + (conversation[-1]["content"] or "")}
        input_ids, attention_mask = self.model.pad([self.model.build_prompt(c) for c in conversations])
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, features: dict[str, torch.Tensor], **kwargs) -> dict[str, torch.Tensor]:
        rows = zip(features["input_ids"], features["attention_mask"], strict=True)
        vectors = self.model.embed_prompts([ids[mask.bool()].tolist() for ids, mask in rows])
        features["sentence_embedding"] = vectors.to(features["input_ids"].device)
        return features

    def save(self, output_path: str, safe_serialization: bool = True, **kwargs) -> None:
        self.model.save_pretrained(output_path)
        # A Router looks for the code of its modules in the folder above theirs.
        for module in (__name__, type(self.model).__module__, type(self.model.config).__module__):
            shutil.copy(sys.modules[module].__file__, Path(output_path).parent)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> "NativeQuery":
        folder = cls.load_dir_path(
            model_name_or_path,
            subfolder=subfolder,
            token=token,
            cache_folder=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
        )
        return cls(NativeRetrievalModel.from_pretrained(folder, **(model_kwargs or {})))


# A Router writes down this name when it is saved, and looks for the file again when it is loaded.
NativeQuery.__module__ = "native_query"
