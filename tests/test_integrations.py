"""At home in other libraries: LangChain and LlamaIndex, each the real package."""

import numpy as np
import pytest

from modeling_native_retrieval import NativeRetrievalModel
from native_retrieval.data import load_task
from native_retrieval.teacher import Teacher

CONVERSATION = [
    {"role": "user", "content": "When was Arnwick Lighthouse founded?"},
    {"role": "assistant", "content": "Arnwick Lighthouse was founded in 1874."},
    {"role": "user", "content": "Who was behind it?"},
]
QUESTIONS = ["Who founded Belford Museum?", "What is the Carrow Railway known for?"]


@pytest.fixture(scope="module")
def model(make_taught_model) -> NativeRetrievalModel:
    return make_taught_model()[0]


# -- LangChain ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(beir_data) -> list[str]:
    return [f"{row['title']} {row['text']}" for row in load_task(beir_data, "test").corpus]


@pytest.fixture(scope="module")
def nearest(model, teacher_dir, corpus) -> list[str]:
    """The three documents next to CONVERSATION, by brute force."""
    scores = Teacher(str(teacher_dir)).encode(corpus, "document") @ model.embed_query(CONVERSATION)[0].numpy()
    return [corpus[row] for row in np.argsort(-scores, kind="stable")[:3]]


@pytest.mark.parametrize("store_name", ["memory", "faiss"])
def test_langchain(store_name, model, teacher_dir, corpus, nearest):
    pytest.importorskip("langchain_core")
    from langchain_core.messages import AIMessage, HumanMessage
    from langchain_core.vectorstores import InMemoryVectorStore

    from native_retrieval.integrations.langchain import NativeRetrievalEmbeddings, NativeRetriever

    embeddings = NativeRetrievalEmbeddings(model, teacher=str(teacher_dir))
    if store_name == "memory":
        store = InMemoryVectorStore.from_texts(corpus, embeddings)
    else:
        store = pytest.importorskip("langchain_community.vectorstores").FAISS.from_texts(corpus, embeddings)
    messages = [
        HumanMessage(CONVERSATION[0]["content"]),
        AIMessage(CONVERSATION[1]["content"]),
        HumanMessage(CONVERSATION[2]["content"]),
    ]
    retriever = NativeRetriever(model=model, store=store, k=3)
    assert [document.page_content for document in retriever.invoke(messages)] == nearest
    by_text = [document.page_content for document in store.similarity_search(QUESTIONS[0], k=3)]
    assert [document.page_content for document in retriever.invoke(QUESTIONS[0])] == by_text


def test_what_langchain_agents_say_is_read(model):
    """Thoughts, pictures, calls without text, results in parts: the text that there is."""
    pytest.importorskip("langchain_core")
    from langchain_core.messages import (
        AIMessage,
        FunctionMessage,
        HumanMessage,
        SystemMessage,
        ToolMessage,
        convert_to_messages,
    )

    from native_retrieval.integrations.langchain import conversation_of

    picture = {"type": "image_url", "image_url": {"url": "https://example.com/bridge.png"}}
    messages = [
        SystemMessage("Be brief."),
        HumanMessage([{"type": "text", "text": QUESTIONS[0]}, picture]),
        AIMessage("", tool_calls=[{"name": "search", "args": {}, "id": "1"}]),
        ToolMessage([{"type": "text", "text": "Found it."}], tool_call_id="1"),
        AIMessage([{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "In 1874."}]),
        FunctionMessage("In 1875.", name="search"),
        HumanMessage(QUESTIONS[1]),
    ]
    messages = [*convert_to_messages([("developer", "Search first.")]), *messages]
    conversation = conversation_of(messages)
    assert [(message["role"], message["content"]) for message in conversation] == [
        ("system", "Search first."),
        ("system", "Be brief."),
        ("user", QUESTIONS[0]),
        ("assistant", ""),
        ("tool", "Found it."),
        ("assistant", "In 1874."),
        ("tool", "In 1875."),
        ("user", QUESTIONS[1]),
    ]
    assert model.embed_query([conversation]).shape == (1, 32)


def test_what_llama_index_agents_say_is_read(model):
    pytest.importorskip("llama_index.core")
    from llama_index.core.base.llms.types import ChatMessage, MessageRole

    from native_retrieval.integrations.llama_index import NativeRetrievalEmbeddings

    roles = [MessageRole.DEVELOPER, MessageRole.USER, MessageRole.MODEL, MessageRole.FUNCTION, MessageRole.USER]
    texts = ["Be brief.", QUESTIONS[0], None, "Found it.", QUESTIONS[1]]
    messages = [ChatMessage(role=role, content=text) for role, text in zip(roles, texts, strict=True)]
    query = NativeRetrievalEmbeddings(model).query(messages)
    wanted = zip(("system", "user", "tool", "user"), (text for text in texts if text), strict=True)
    plain = [{"role": role, "content": text} for role, text in wanted]
    np.testing.assert_allclose(query.embedding, model.embed_query([plain])[0].numpy(), atol=1e-6)
    assert query.query_str == QUESTIONS[1]


def test_langchain_without_a_teacher_searches_and_says_why_it_cannot_add(model):
    pytest.importorskip("langchain_core")
    from native_retrieval.integrations.langchain import NativeRetrievalEmbeddings

    embeddings = NativeRetrievalEmbeddings(model)
    assert len(embeddings.embed_query(QUESTIONS[0])) == 32
    with pytest.raises(ValueError, match="teacher="):
        embeddings.embed_documents(["A document."])


# -- LlamaIndex ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store_name", ["memory", "faiss"])
def test_llama_index(store_name, model, teacher_dir, corpus, nearest):
    core = pytest.importorskip("llama_index.core")
    from llama_index.core.base.llms.types import ChatMessage

    from native_retrieval.integrations.llama_index import NativeRetrievalEmbeddings

    embeddings = NativeRetrievalEmbeddings(model, teacher=str(teacher_dir))
    context = None
    if store_name == "faiss":
        import faiss

        stores = pytest.importorskip("llama_index.vector_stores.faiss")
        context = core.StorageContext.from_defaults(vector_store=stores.FaissVectorStore(faiss.IndexFlatIP(32)))
    index = core.VectorStoreIndex.from_documents(
        [core.Document(text=text) for text in corpus], embed_model=embeddings, storage_context=context
    )
    retriever = index.as_retriever(similarity_top_k=3)
    messages = [ChatMessage(role=message["role"], content=message["content"]) for message in CONVERSATION]
    assert [found.text for found in retriever.retrieve(embeddings.query(messages))] == nearest
    found = [found.text for found in retriever.retrieve(QUESTIONS[0])]
    assert found == [found.text for found in retriever.retrieve(embeddings.query(QUESTIONS[0]))]
