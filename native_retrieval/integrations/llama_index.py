# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
LlamaIndex: an embedding model for its indexes, whose query may be a conversation.

    from llama_index.core import Document, VectorStoreIndex
    from native_retrieval.integrations.llama_index import NativeRetrievalEmbeddings

    embeddings = NativeRetrievalEmbeddings(model, teacher="sentence-transformers/all-MiniLM-L6-v2")
    index = VectorStoreIndex.from_documents([Document(text="Guernica is a painting ...")], embed_model=embeddings)
    index.as_retriever().retrieve(embeddings.query([ChatMessage("Who painted Guernica?"), ...]))
    bm25_retriever.retrieve(embeddings.query([ChatMessage("Who painted Guernica?"), ...], search="text"))
"""

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import QueryBundle

from ..teacher import teacher_of
from .messages import as_conversation, message_of


def conversation_of(query: Any) -> list[dict[str, Any]]:
    """
    LlamaIndex's messages as OpenAI-shaped dicts, which a model takes. What a model has thought is left out.

    Args:
        query: text, a message, a sequence of messages (also dicts), or anything that holds `messages`.

    Raises:
        `ValueError`: for anything else, and for no messages.
    """
    return as_conversation(query, _message)


def _message(message: Any) -> dict[str, Any] | None:
    if not isinstance(message, ChatMessage):
        return None
    return message_of(message.role, message.blocks, message.additional_kwargs)


class NativeRetrievalEmbeddings(BaseEmbedding):
    """
    Queries are embedded by a language model's own hidden states, documents by its teacher.

    Args:
        model (`NativeRetrievalModel`): a trained model, as `AutoModel.from_pretrained` returns it.
        teacher (`str`, *optional*): name or path of its teacher, for adding documents. Searching needs none.
        fields: those of LlamaIndex's `BaseEmbedding`.

    Raises:
        `ValueError`: if `teacher` is not the model's, or for an unknown field.
    """

    _model: Any = PrivateAttr()
    _teacher: Any = PrivateAttr()

    def __init__(self, model, teacher: str | None = None, **fields):
        if unknown := sorted(fields.keys() - type(self).model_fields.keys()):
            raise ValueError(
                f"NativeRetrievalEmbeddings has no field {unknown[0]!r}, wanted model, teacher, or one of "
                f"{', '.join(type(self).model_fields)}."
            )
        super().__init__(**{"model_name": model.config.name_or_path or "native-retrieval", **fields})
        self._model = model
        self._teacher = teacher_of(model.config, teacher) if teacher else None

    @classmethod
    def class_name(cls) -> str:
        return "NativeRetrievalEmbeddings"

    def query(self, messages: Any, search: str = "vector") -> QueryBundle:
        """
        A conversation (or question), see [`conversation_of`], as a query for any retriever of LlamaIndex.

        Args:
            search (`str`): `"vector"` for a retriever over the teacher's vectors. `"text"` for any other, BM25 or an index
                of another embedding model: the query is the text of `model.extract_query`, without a vector.

        Raises:
            `ValueError`: for no conversation, or another `search`.
        """
        if search not in ("vector", "text"):
            raise ValueError(f"search is {search!r}, wanted 'vector' or 'text'.")
        conversation = conversation_of(messages)
        if search == "text":
            return QueryBundle(self._model.extract_query([conversation])[0])
        text = next((message["content"] for message in reversed(conversation) if message["content"].strip()), "")
        return QueryBundle(text, embedding=self._get_query_embedding(conversation))

    async def aquery(self, messages: Any, search: str = "vector") -> QueryBundle:
        """As [`query`], in a thread."""
        return await asyncio.to_thread(self.query, messages, search)

    def _get_query_embedding(self, query: Any) -> Embedding:
        return self._model.embed_query([conversation_of(query)])[0].tolist()

    async def _aget_query_embedding(self, query: Any) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        if self._teacher is None:
            raise ValueError(
                "these embeddings have no teacher, which documents need; pass "
                f"teacher={self._model.config.teacher_name_or_path!r}"
            )
        return self._teacher.encode(texts, "document").tolist()

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
