# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
The parts of an exported sentence-transformers model that are not sentence-transformers' own: the query route, which is a
`NativeRetrievalModel`, and the router between it and the teacher.

`native_retrieval.export` writes this file into the exported folder, beside the model's files.
"""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import InputModule, Router
from transformers.dynamic_module_utils import init_hf_modules

try:  # in an exported folder these files form a package; in the repository they are plain modules
    from .configuration_native_retrieval import NativeRetrievalConfig
    from .messages_native_retrieval import as_conversations, clean_messages
    from .modeling_native_retrieval import NativeRetrievalModel
    from .processing_native_retrieval import NativeRetrievalProcessor
except ImportError:
    from configuration_native_retrieval import NativeRetrievalConfig
    from messages_native_retrieval import as_conversations, clean_messages
    from modeling_native_retrieval import NativeRetrievalModel
    from processing_native_retrieval import NativeRetrievalProcessor


class _Call:
    """Pickles as a function call, and so unpickles as its result."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


class _Picklable:
    """For classes whose `__module__` cannot be imported (see the end of this file)."""

    def __reduce__(self):
        # A new process can import the code of an exported folder only after `init_hf_modules()`, which returns None.
        module = _Call(import_module, __name__, _Call(init_hf_modules))
        return object.__new__, (_Call(getattr, module, type(self).__name__),), self.__dict__


class NativeQuery(_Picklable, InputModule):
    """
    Queries to unit vectors in the teacher's space, `(batch, embedding_dim)`. A query is a string, a conversation (a list
    of messages), or a row `{"messages": [...], "tools": [...]}`.
    """

    save_in_root = False

    def __init__(self, model: NativeRetrievalModel):
        super().__init__()
        self.model = model

    @property
    def modalities(self) -> list[str]:
        return ["text", "message"]

    @property
    def tokenizer(self):
        return self.model.processor.tokenizer

    @property
    def max_seq_length(self) -> int | None:
        """Longest prompt, in tokens; `None` for no limit."""
        return self.model.processor.max_prompt_tokens

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise ValueError(f"max_seq_length={value} must be at least 1")
        self.model.processor.max_prompt_tokens = value

    def get_embedding_dimension(self) -> int:
        return self.model.config.embedding_dim

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, processing_kwargs: dict | None = None, **kwargs
    ) -> dict[str, torch.Tensor]:
        """
        Queries to `input_ids` and `attention_mask`, `(batch, tokens)`, padded on the left.

        Args:
            prompt: goes before the text of the last message.
            processing_kwargs: its `"chat_template"` holds arguments of the backbone's chat template.
        """
        processor, template_kwargs = self.model.processor, (processing_kwargs or {}).get("chat_template", {})
        queries = [[{"role": "user", "content": query}] if isinstance(query, str) else query for query in inputs]
        prompts = []
        for messages, tools in as_conversations(queries):
            if prompt:
                messages = clean_messages(messages)
                messages[-1]["content"] = prompt + messages[-1]["content"]
            prompts.append(processor.encode(messages, tools=tools, **template_kwargs))
        input_ids, attention_mask = processor.pad(prompts)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, features: dict[str, torch.Tensor], **kwargs) -> dict[str, torch.Tensor]:
        rows = zip(features["input_ids"], features["attention_mask"], strict=True)
        vectors = self.model.embed_prompts([ids[mask.bool()].tolist() for ids, mask in rows])
        features["sentence_embedding"] = vectors.to(features["input_ids"].device)
        return features

    def save(self, output_path: str, *args, safe_serialization: bool = True, **kwargs) -> None:
        self.model.save_pretrained(output_path)
        # sentence-transformers looks for code in the folder above.
        for file in (__file__, *Path(output_path).glob("*.py")):
            shutil.copy(file, Path(output_path).parent)

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
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> "NativeQuery":
        hub = {"token": token, "local_files_only": local_files_only}
        folder = cls.load_dir_path(
            model_name_or_path, subfolder=subfolder, cache_folder=cache_folder, revision=revision, **hub
        )
        config = NativeRetrievalConfig.from_pretrained(folder, **(config_kwargs or {}))
        hub |= {"cache_dir": cache_folder}  # for a backbone that is not stored in the folder
        model = NativeRetrievalModel.from_pretrained(folder, config=config, **hub, **(model_kwargs or {}))
        if processor_kwargs:
            limit = processor_kwargs.get("model_max_length", model.processor.max_prompt_tokens)
            processor_kwargs = {"config": config, "max_prompt_tokens": limit, **processor_kwargs}
            model.processor = NativeRetrievalProcessor.from_pretrained(folder, **processor_kwargs)
        return cls(model)


class NativeRouter(_Picklable, Router):
    """sentence-transformers' router, for a teacher that may have no limit of length, as a static embedding."""

    @property
    def max_seq_length(self) -> int | None:
        return self.sub_modules["query"][0].max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        for route in self.sub_modules.values():
            with suppress(AttributeError):
                route[0].max_seq_length = value


# The names under which a folder lists these classes: their file in that folder, wherever they come from now.
NativeQuery.__module__ = NativeRouter.__module__ = "native_query"
