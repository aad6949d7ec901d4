# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
LangChain: embeddings for any vector store, and a retriever whose query is the conversation.

    from langchain_core.vectorstores import InMemoryVectorStore
    from native_retrieval.integrations.langchain import NativeRetrievalEmbeddings, NativeRetriever

    store = InMemoryVectorStore(NativeRetrievalEmbeddings(model, teacher="sentence-transformers/all-MiniLM-L6-v2"))
    store.add_texts(["Guernica is a painting by Pablo Picasso.", "Málaga is a port in Andalusia."])
    NativeRetriever(model=model, store=store).invoke([HumanMessage("Who painted Guernica?"), ...])

If the store exists already, leave the teacher out: it is not loaded. With `search="text"` the store may hold any vectors, or
be a retriever of texts such as BM25.
"""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import run_in_executor
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from pydantic import ConfigDict, Field, InstanceOf, ValidationError

from ..teacher import teacher_of
from .messages import as_conversation, message_of

# The store's method for each type of search. For scores, stores name it differently: the first that the store has.
SEARCHES = {
    "similarity": ("similarity_search_by_vector",),
    "mmr": ("max_marginal_relevance_search_by_vector",),
    "similarity_score_threshold": (
        "similarity_search_with_score_by_vector",
        "similarity_search_by_vector_with_relevance_scores",
        "similarity_search_by_vector_with_score",
    ),
}


def conversation_of(query: Any) -> list[dict[str, Any]]:
    """
    LangChain's messages as OpenAI-shaped dicts, which a model takes. What a model has thought is left out.

    Args:
        query: text, a message, a sequence of messages (also `("human", "...")` tuples and dicts), a prompt value, or
            anything that holds `messages`, such as a graph's state.

    Raises:
        `ValueError`: for anything else, and for no messages.
    """
    return as_conversation(query, _message)


def _message(message: Any) -> dict[str, Any] | None:
    if not isinstance(message, BaseMessage):
        return None
    fields = {**message.additional_kwargs, **vars(message)}
    if isinstance(message, AIMessage):
        fields["tool_calls"] = [*message.tool_calls, *message.invalid_tool_calls]
    role = getattr(message, "role", message.type.removesuffix("MessageChunk").lower())
    return message_of(role, message.content, fields)


class NativeRetrievalEmbeddings(Embeddings):
    """
    Queries are embedded by a language model's own hidden states, documents by its teacher.

    Args:
        model (`NativeRetrievalModel`): a trained model, as `AutoModel.from_pretrained` returns it.
        teacher (`str`, *optional*): name or path of its teacher, for adding documents. Searching needs none.

    Raises:
        `ValueError`: if `teacher` is not the model's.
    """

    def __init__(self, model, teacher: str | None = None):
        self.model = model
        self.teacher = teacher_of(model.config, teacher) if teacher else None

    def embed_query(self, text: str) -> list[float]:
        return self.model.embed_query([conversation_of(text)])[0].tolist()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        if self.teacher is None:
            raise ValueError(
                "these embeddings have no teacher, which documents need; pass "
                f"teacher={self.model.config.teacher_name_or_path!r}"
            )
        return self.teacher.encode(texts, "document").tolist()


class NativeRetriever(BaseRetriever):
    """
    The documents of a vector store for a conversation, or for a single question; see [`conversation_of`].

    It searches as `store.as_retriever()` does, by the model's vector or by its text (`model.extract_query`). Arguments of
    `invoke`, such as `filter` and `k`, go before `search_kwargs`, and these before `k`.

    Args:
        model (`NativeRetrievalModel`): a trained model.
        store (`VectorStore` or `BaseRetriever`): by vector, any store that holds the teacher's vectors; by text, any store,
            whatever its embeddings, or any retriever of texts, such as `BM25Retriever`.
        search (`str`): `"vector"` or `"text"`.
        k (`int`): number of documents to return; of a retriever, which has a number of its own, at most.
        search_type (`str`): `"similarity"`, `"mmr"` or `"similarity_score_threshold"`, if the store has it.
        search_kwargs (`dict`): further arguments of the store's search, such as `filter` or `score_threshold`.

    Raises:
        `ValueError`: for an unknown field, or a wrong value of one.
    """

    model: Any
    store: VectorStore | InstanceOf[BaseRetriever]
    search: str = "vector"
    k: int = 5
    search_type: str = "similarity"
    search_kwargs: dict[str, Any] = Field(default_factory=dict)

    model_config = ConfigDict(extra="forbid")

    def __init__(self, **fields: Any) -> None:
        if unknown := sorted(fields.keys() - type(self).model_fields.keys()):
            raise ValueError(
                f"NativeRetriever has no field {unknown[0]!r}, wanted one of {', '.join(type(self).model_fields)}; "
                "give the store's own arguments in search_kwargs."
            )
        try:
            super().__init__(**fields)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise ValueError(f"NativeRetriever has a field that does not fit ({wrong}).") from None
        self._plan({})

    def _plan(self, given: dict[str, Any]) -> tuple[str, dict[str, Any], float | None]:
        """The name of the store's method, its arguments, and the lowest score of a search by vector."""
        arguments, name = {"k": self.k, **self.search_kwargs, **given}, type(self.store).__name__
        if self.search not in ("vector", "text"):
            raise ValueError(f"search is {self.search!r}, wanted 'vector' or 'text'.")
        if self.search_type not in SEARCHES:
            raise ValueError(f"search_type is {self.search_type!r}, wanted one of {', '.join(SEARCHES)}.")
        if not isinstance(k := arguments["k"], int) or k < 1:
            raise ValueError(f"k is {k!r}, wanted at least 1; ask for the number of documents that you want back.")
        if isinstance(self.store, BaseRetriever):
            if self.search == "vector":
                raise ValueError(f"{name} is a retriever of texts; give search='text', or a vector store.")
            if others := [*(arguments.keys() - {"k"}), *["search_type"] * (self.search_type != "similarity")]:
                raise ValueError(f"{name} is a retriever, and takes only k from here; give {others[0]!r} to it.")
            return "invoke", arguments, None
        threshold = None
        if self.search_type == "similarity_score_threshold":
            threshold = arguments.get("score_threshold")
            if not isinstance(threshold, int | float):
                raise ValueError(
                    f"score_threshold is {threshold!r}, wanted a number from 0 to 1; give it in search_kwargs."
                )
        known = _parameters(type(self.store))
        for given_name in arguments.keys() - known:
            if meant := difflib.get_close_matches(given_name, known, n=1, cutoff=0.8):
                raise ValueError(f"{name} has no search argument {given_name!r}; did you mean {meant[0]!r}?")
        if self.search == "text":
            return "search", {"search_type": self.search_type, **arguments}, None
        arguments.pop("score_threshold", None)
        methods = [name for name in SEARCHES[self.search_type] if hasattr(self.store, name)]
        if not methods:
            raise self._refusal()
        return methods[0], arguments, threshold

    def _refusal(self) -> ValueError:
        return ValueError(
            f"{type(self.store).__name__} has no search of type {self.search_type!r} by {self.search}, wanted one of "
            f"{', '.join(SEARCHES)} that it has; give another search_type or store."
        )

    def _relevant(self, found: list, threshold: float | None) -> list[Document]:
        if threshold is None:
            return found
        if isinstance(self.store, InMemoryVectorStore):  # it has no such function; its scores are cosines
            return [document for document, score in found if score >= threshold]
        relevance = self.store._select_relevance_score_fn()
        return [document for document, score in found if relevance(score) >= threshold]

    def _asked(self, conversation: list[dict[str, Any]]) -> str | list[float]:
        """What the store is searched with."""
        if self.search == "text":
            return self.model.extract_query([conversation])[0]
        return self.model.embed_query([conversation])[0].tolist()

    def _get_relevant_documents(
        self, query: Any, *, run_manager: CallbackManagerForRetrieverRun, **given: Any
    ) -> list[Document]:
        method, arguments, threshold = self._plan(given)
        asked = self._asked(conversation_of(query))
        if isinstance(self.store, BaseRetriever):
            return self.store.invoke(asked, {"callbacks": run_manager.get_child()})[: arguments["k"]]
        try:
            return self._relevant(getattr(self.store, method)(asked, **arguments), threshold)
        except NotImplementedError as error:
            raise self._refusal() from error

    async def _aget_relevant_documents(
        self, query: Any, *, run_manager: AsyncCallbackManagerForRetrieverRun, **given: Any
    ) -> list[Document]:
        method, arguments, threshold = self._plan(given)
        asked = await run_in_executor(None, self._asked, conversation_of(query))
        if isinstance(self.store, BaseRetriever):
            found = await self.store.ainvoke(asked, {"callbacks": run_manager.get_child()})
            return found[: arguments["k"]]
        try:
            if hasattr(self.store, f"a{method}"):
                found = await getattr(self.store, f"a{method}")(asked, **arguments)
            else:
                found = await run_in_executor(None, getattr(self.store, method), asked, **arguments)
            return self._relevant(found, threshold)
        except NotImplementedError as error:
            raise self._refusal() from error


def _parameters(store: type[VectorStore]) -> set[str]:
    """The names of the arguments that any search of a store has."""
    searches: Sequence[Any] = [getattr(store, name) for name in dir(store) if "search" in name]
    names = (name for search in searches if callable(search) for name in inspect.signature(search).parameters)
    return {"score_threshold", *names}
