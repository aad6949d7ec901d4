# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
LangChain: embeddings for any vector store, and a retriever that takes the messages themselves.

    from langchain_core.vectorstores import InMemoryVectorStore
    from native_retrieval.integrations.langchain import NativeRetrievalEmbeddings, NativeRetriever

    store = InMemoryVectorStore(NativeRetrievalEmbeddings(model, teacher="sentence-transformers/all-MiniLM-L6-v2"))
    store.add_texts(["Guernica is a painting by Pablo Picasso.", "Málaga is a port in Andalusia."])
    NativeRetriever(model=model, store=store).invoke([HumanMessage("Who painted Guernica?"), ...])

Where the store exists already, no teacher is loaded: leave it out.
"""

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import BaseMessage, convert_to_openai_messages
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore

from ..teacher import teacher_of
from . import ROLES


def conversation_of(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """LangChain's messages as a model takes them: roles and text, without pictures and what a model has thought."""
    roles = [convert_to_openai_messages(message)["role"] for message in messages]
    return [
        {"role": ROLES.get(role, role), "content": str(message.text)}
        for role, message in zip(roles, messages, strict=True)
    ]


class NativeRetrievalEmbeddings(Embeddings):
    """
    Queries by a language model's own hidden states, documents by its teacher.

    Args:
        model (`NativeRetrievalModel`): a trained model, as `AutoModel.from_pretrained` gives it.
        teacher (`str`, *optional*): name or path of its teacher, for adding documents. A store that is only searched
            needs none.

    Raises:
        `ValueError`: if `teacher` is not the model's.
    """

    def __init__(self, model, teacher: str | None = None):
        self.model = model
        self.teacher = teacher_of(model.config, teacher) if teacher else None

    def embed_query(self, text: str) -> list[float]:
        return self.model.embed_query(text)[0].tolist()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        if self.teacher is None:
            raise ValueError(
                "these embeddings have no teacher, which documents need; pass "
                f"teacher={self.model.config.teacher_name_or_path!r}"
            )
        return self.teacher.encode(texts, "document").tolist()


class NativeRetriever(BaseRetriever):
    """
    The documents of a vector store for a conversation, or for a single question.

    Args:
        model (`NativeRetrievalModel`): a trained model.
        store (`VectorStore`): holds the teacher's vectors; any store that can be searched by vector.
        k (`int`): documents to return.
    """

    model: Any
    store: VectorStore
    k: int = 5

    def _get_relevant_documents(
        self, query: str | Sequence[BaseMessage], *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        conversation = query if isinstance(query, str) else conversation_of(query)
        vector = self.model.embed_query([conversation])[0].tolist()
        return self.store.similarity_search_by_vector(vector, k=self.k)
