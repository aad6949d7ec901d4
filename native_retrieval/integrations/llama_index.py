# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
LlamaIndex: an embedding model for its indexes, and conversations as queries.

    from llama_index.core import Document, VectorStoreIndex
    from native_retrieval.integrations.llama_index import NativeRetrievalEmbeddings

    embeddings = NativeRetrievalEmbeddings(model, teacher="sentence-transformers/all-MiniLM-L6-v2")
    index = VectorStoreIndex.from_documents([Document(text="Guernica is a painting ...")], embed_model=embeddings)
    index.as_retriever().retrieve(embeddings.query([ChatMessage("Who painted Guernica?"), ...]))
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import QueryBundle

from ..teacher import teacher_of
from . import ROLES


class NativeRetrievalEmbeddings(BaseEmbedding):
    """
    Queries by a language model's own hidden states, documents by its teacher.

    Args:
        model (`NativeRetrievalModel`): a trained model, as `AutoModel.from_pretrained` gives it.
        teacher (`str`, *optional*): name or path of its teacher, for adding documents. An index that is only searched
            needs none.

    Raises:
        `ValueError`: if `teacher` is not the model's.
    """

    _model: Any = PrivateAttr()
    _teacher: Any = PrivateAttr()

    def __init__(self, model, teacher: str | None = None, **kwargs):
        super().__init__(model_name=model.config.name_or_path or "native-retrieval", **kwargs)
        self._model = model
        self._teacher = teacher_of(model.config, teacher) if teacher else None

    @classmethod
    def class_name(cls) -> str:
        return "NativeRetrievalEmbeddings"

    def query(self, messages: str | Sequence[ChatMessage]) -> QueryBundle:
        """A conversation (or question) as a query that any retriever of LlamaIndex takes."""
        if isinstance(messages, str):
            return QueryBundle(messages, embedding=self._get_query_embedding(messages))
        conversation = [
            {"role": ROLES.get(message.role.value, message.role.value), "content": message.content or ""}
            for message in messages
        ]
        return QueryBundle(conversation[-1]["content"], embedding=self._embed(conversation))

    def _embed(self, conversation) -> Embedding:
        return self._model.embed_query([conversation])[0].tolist()

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._embed(query)

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._embed, query)

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        if self._teacher is None:
            raise ValueError(
                "these embeddings have no teacher, which documents need; pass "
                f"teacher={self._model.config.teacher_name_or_path!r}"
            )
        return self._teacher.encode(texts, "document").tolist()
