"""At home in other libraries: LangChain and LlamaIndex, each the real package."""

import asyncio
import json

import numpy as np
import pytest
from conftest import assert_one_line

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
    """Thoughts, pictures, calls without text, results in parts: the text that there is, and a mark for a picture."""
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
        ("user", f"{QUESTIONS[0]}\n[image]"),
        ("assistant", ""),
        ("tool", "Found it."),
        ("assistant", "In 1874."),
        ("tool", "In 1875."),
        ("user", QUESTIONS[1]),
    ]
    assert model.embed_query([conversation]).shape == (1, 32)


# What a tool or a user says in parts, and its text. A model's thoughts are no text, pictures leave a mark.
PARTS = {
    "text": (
        [{"type": "text", "text": "Who painted"}, {"type": "text", "text": "Guernica?"}],
        "Who painted\nGuernica?",
    ),
    "strings": (["Who painted", "Guernica?"], "Who painted\nGuernica?"),
    "OpenAI's responses": (
        [{"type": "input_text", "text": "Who?"}, {"type": "output_text", "text": "He."}],
        "Who?\nHe.",
    ),
    "a picture": (
        [{"type": "image_url", "image_url": {"url": "data:..."}}, {"type": "text", "text": "Who?"}],
        "[image]\nWho?",
    ),
    "a picture without a source": ([{"type": "image"}], "[image]"),
    "sound": ([{"type": "input_audio", "input_audio": {"data": "...", "format": "wav"}}], "[audio]"),
    "a file": ([{"type": "file", "file": {"file_data": "..."}}], "[file]"),
    "a video": ([{"type": "video", "url": "https://example.com/a.mp4"}], "[video]"),
    "Google's media": ([{"type": "media", "mime_type": "image/png", "data": "..."}], "[image]"),
    "thoughts": ([{"type": "thinking", "thinking": "Hm."}, {"type": "reasoning", "reasoning": "Hm."}, "He."], "He."),
    "a refusal": ([{"type": "refusal", "refusal": "I cannot."}], "I cannot."),
    "JSON": (
        [{"type": "json", "json": {"year": 1937}}, {"json": {"port": "Málaga"}}],
        '{"year": 1937}\n{"port": "Málaga"}',
    ),
    "a JSON block with other keys": (
        [{"type": "json", "data": {"year": 1937}}],
        '{"type": "json", "data": {"year": 1937}}',
    ),
    "rows": ([{"title": "Malaga", "text": "A port."}], '{"title": "Malaga", "text": "A port."}'),
    "documents": ([{"page_content": "A port.", "metadata": {"title": "Malaga"}, "type": "Document"}], "A port."),
    "documents without a type": ([{"page_content": "A port.", "metadata": {}}], "A port."),
    "Anthropic's document": ([{"type": "document", "source": {"type": "text", "data": "A port."}}], "A port."),
    "Anthropic's file": ([{"type": "document", "source": {"type": "base64", "data": "JVBERi0="}}], "[document]"),
    "search results": (
        [{"type": "search_result", "title": "Malaga", "content": [{"type": "text", "text": "A port."}]}],
        "Malaga\nA port.",
    ),
    "a tool's result": ([{"type": "tool_result", "tool_use_id": "1", "content": "A port."}], "A port."),
    "a tool's result in parts": (
        [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "A port."}]}],
        "A port.",
    ),
    "a part of the provider": ([{"type": "non_standard", "value": {"type": "text", "text": "A port."}}], "A port."),
    "Bedrock's": ([{"text": "A port."}], "A port."),
    "an empty part": ([{"type": "text"}, {"type": "text", "text": "Who?"}], "Who?"),
    "nothing": ([], ""),
}


@pytest.mark.parametrize(("content", "text"), PARTS.values(), ids=PARTS)
def test_parts_of_a_message_are_lines_of_text(content, text):
    pytest.importorskip("langchain_core")
    from langchain_core.messages import HumanMessage, ToolMessage

    from native_retrieval.integrations.langchain import conversation_of

    for message in (
        HumanMessage(content),
        ToolMessage(content, tool_call_id="1"),
        {"role": "user", "content": content},
    ):
        assert conversation_of([message])[0]["content"] == text


def test_tool_calls_and_results_are_kept():
    pytest.importorskip("langchain_core")
    from langchain_core.messages import AIMessage, ToolMessage

    from native_retrieval.integrations.langchain import conversation_of

    call = {"type": "function", "id": "1", "function": {"name": "search", "arguments": '{"query": "Málaga"}'}}
    made = {"name": "search", "args": {"query": "Málaga"}, "id": "1"}
    spellings = [
        AIMessage("", tool_calls=[made]),
        AIMessage([{"type": "tool_use", "name": "search", "input": {"query": "Málaga"}, "id": "1"}]),
        AIMessage("", additional_kwargs={"tool_calls": [call]}),
        AIMessage("", invalid_tool_calls=[made | {"args": '{"query": "Málaga"}', "error": None}]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "content": [{"type": "function_call", "call_id": "1", **call["function"]}]},
    ]
    for spelling in spellings:
        assert conversation_of([spelling]) == [{"role": "assistant", "content": "", "tool_calls": [call]}]
    for field in ({"function_call": call["function"]}, {"refusal": "No."}):
        for spelling in ({"role": "assistant", "content": None, **field}, AIMessage("", additional_kwargs=field)):
            assert conversation_of(spelling) == [{"role": "assistant", "content": "", **field}]
    result = {"role": "tool", "content": "A port.", "tool_call_id": "1", "name": "search"}
    for message in (ToolMessage("A port.", tool_call_id="1", name="search"), result):
        assert conversation_of([message]) == [result]


def test_turns_that_say_nothing_are_left_out():
    pytest.importorskip("langchain_core")
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    from native_retrieval.integrations.langchain import conversation_of

    thoughts = AIMessage([{"type": "thinking", "thinking": "Hm."}])
    result = ToolMessage("", tool_call_id="1")
    conversation = conversation_of([HumanMessage(QUESTIONS[0]), thoughts, AIMessage(""), result, HumanMessage("")])
    assert [message["role"] for message in conversation] == ["user", "tool", "user"]


def langchain_queries() -> dict:
    """One conversation, as users of LangChain pass it."""
    from dataclasses import dataclass

    from langchain_core.chat_history import InMemoryChatMessageHistory
    from langchain_core.load import dumpd
    from langchain_core.messages import AIMessageChunk, HumanMessageChunk, convert_to_messages, messages_to_dict
    from langchain_core.prompt_values import ChatPromptValue

    @dataclass
    class State:
        messages: list

    pairs = [({"user": "human", "assistant": "ai"}[turn["role"]], turn["content"]) for turn in CONVERSATION]
    messages = convert_to_messages(CONVERSATION)
    return {
        "messages": messages,
        "a tuple of messages": tuple(messages),
        "an array": np.array(CONVERSATION, dtype=object),
        "pairs": pairs,
        "OpenAI's dicts": CONVERSATION,
        "mixed": [pairs[0], messages[1], CONVERSATION[2]],
        "a state": {"messages": messages},
        "a state of dicts": {"messages": CONVERSATION, "documents": []},
        "a state object": State(messages),
        "a history": InMemoryChatMessageHistory(messages=messages),
        "a prompt value": ChatPromptValue(messages=messages),
        "dumped": messages_to_dict(messages),
        "serialised": [dumpd(message) for message in messages],
        "typed dicts": [{"type": kind, "content": text} for kind, text in pairs],
        "chunks": [{"human": HumanMessageChunk, "ai": AIMessageChunk}[kind](text) for kind, text in pairs],
    }


def test_conversations_of_any_shape_are_taken():
    pytest.importorskip("langchain_core")
    from native_retrieval.integrations.langchain import conversation_of

    for name, query in langchain_queries().items():
        assert conversation_of(query) == CONVERSATION, name


def test_single_messages_of_any_shape_are_taken():
    pytest.importorskip("langchain_core")
    from langchain_core.messages import ChatMessage, HumanMessage
    from langchain_core.prompt_values import StringPromptValue

    from native_retrieval.integrations.langchain import conversation_of

    wanted = [{"role": "user", "content": QUESTIONS[0]}]
    spellings = [
        *(QUESTIONS[0], HumanMessage(QUESTIONS[0]), ("human", QUESTIONS[0]), ("user", QUESTIONS[0]), wanted[0]),
        *(
            [QUESTIONS[0]],
            [("human", QUESTIONS[0])],
            {"messages": QUESTIONS[0]},
            {"messages": HumanMessage(QUESTIONS[0])},
        ),
        *(StringPromptValue(text=QUESTIONS[0]), ChatMessage(QUESTIONS[0], role="user"), [["human", QUESTIONS[0]]]),
    ]
    for spelling in spellings:
        assert conversation_of(spelling) == wanted, spelling


@pytest.mark.parametrize(
    "query",
    [None, 7, 1.5, b"Who?", [], {}, {"messages": []}, {"messages": None}, {"question": "Who?"}, [7], [None], [[]], [{}]]
    + [
        [{"content": "Who?"}],
        [("human", "Who?", "When?")],
        [[CONVERSATION]],
        pytest.param(object(), id="an object"),
        "",
        [("human", "")],
        [("critic", "No.")],
    ],
    ids=repr,
)
def test_what_is_no_conversation_is_refused_in_one_line(model, query):
    pytest.importorskip("langchain_core")
    from langchain_core.vectorstores import InMemoryVectorStore

    from native_retrieval.integrations.langchain import NativeRetrievalEmbeddings, NativeRetriever

    retriever = NativeRetriever(model=model, store=InMemoryVectorStore(NativeRetrievalEmbeddings(model)))
    for call in (retriever.invoke, lambda query: asyncio.run(retriever.ainvoke(query))):
        with pytest.raises(ValueError) as error:
            call(query)
        assert_one_line(error)
        assert "Who?" not in str(error.value)


def make_langchain_store(name: str, embeddings, corpus):
    metadata = [{"tenant": "ab"[number % 2], "number": number} for number in range(len(corpus))]
    if name == "memory":
        from langchain_core.vectorstores import InMemoryVectorStore

        return InMemoryVectorStore.from_texts(corpus, embeddings, metadata)
    return pytest.importorskip("langchain_community.vectorstores").FAISS.from_texts(corpus, embeddings, metadata)


@pytest.fixture(params=["memory", "faiss"])
def langchain_store(request, model, teacher_dir, corpus):
    pytest.importorskip("langchain_core")
    from native_retrieval.integrations.langchain import NativeRetrievalEmbeddings

    return make_langchain_store(request.param, NativeRetrievalEmbeddings(model, teacher=str(teacher_dir)), corpus)


def tenant(store, name: str):
    """A filter, as each store has it."""
    if type(store).__name__ == "FAISS":
        return {"tenant": name}
    return lambda document: document.metadata["tenant"] == name


SEARCHES = [
    ("similarity", {}),
    ("similarity", {"k": 2}),
    ("similarity", {"k": 1000}),
    ("similarity", {"filter": "b"}),
    ("similarity", {"filter": "b", "k": 3}),
    ("mmr", {"k": 4, "fetch_k": 8, "lambda_mult": 0.2}),
    ("mmr", {"filter": "a", "k": 4}),
    ("similarity_score_threshold", {"score_threshold": 0.0, "k": 6}),
    ("similarity_score_threshold", {"score_threshold": 0.4, "k": 6, "filter": "a"}),
    ("similarity_score_threshold", {"score_threshold": 2.0}),
]


@pytest.mark.parametrize(("search_type", "arguments"), SEARCHES, ids=str)
def test_it_searches_as_the_stores_own_retriever(langchain_store, model, search_type, arguments):
    from native_retrieval.integrations.langchain import NativeRetriever

    arguments = dict(arguments)
    if "filter" in arguments:
        arguments["filter"] = tenant(langchain_store, arguments["filter"])
    own = langchain_store.as_retriever(search_type=search_type, search_kwargs={"k": 5, **arguments})
    if search_type == "similarity_score_threshold" and type(langchain_store).__name__ == "InMemoryVectorStore":
        less = {"k": 5} | {name: value for name, value in arguments.items() if name != "score_threshold"}
        found = langchain_store.similarity_search_with_score(QUESTIONS[0], **less)
        wanted = [document for document, score in found if score >= arguments["score_threshold"]]
    else:
        wanted = own.invoke(QUESTIONS[0])
    fields = {"model": model, "store": langchain_store, "search_type": search_type}
    retriever = NativeRetriever(**fields, search_kwargs=arguments)
    assert retriever.invoke(QUESTIONS[0]) == asyncio.run(retriever.ainvoke(QUESTIONS[0])) == wanted
    late = {name: value for name, value in arguments.items() if name != "score_threshold"}
    early = {name: value for name, value in arguments.items() if name == "score_threshold"}
    retriever = NativeRetriever(**fields, search_kwargs=early)
    assert retriever.invoke(QUESTIONS[0], **late) == wanted
    assert asyncio.run(retriever.ainvoke(QUESTIONS[0], **late)) == wanted


def test_what_is_given_later_goes_first(langchain_store, model):
    from native_retrieval.integrations.langchain import NativeRetriever

    a, b = tenant(langchain_store, "a"), tenant(langchain_store, "b")
    retriever = NativeRetriever(model=model, store=langchain_store, k=1, search_kwargs={"filter": a})
    for found, number, name in (
        (retriever.invoke(CONVERSATION), 1, "a"),
        (retriever.invoke(CONVERSATION, filter=b, k=2), 2, "b"),
        (retriever.bind(filter=b).invoke(CONVERSATION), 1, "b"),
        (retriever.batch([CONVERSATION], filter=b, k=3)[0], 3, "b"),
    ):
        assert [document.metadata["tenant"] for document in found] == [name] * number


def test_many_queries_and_a_prompt_before_it(langchain_store, model, nearest):
    from langchain_core.messages import convert_to_messages
    from langchain_core.prompts import ChatPromptTemplate, PromptTemplate

    from native_retrieval.integrations.langchain import NativeRetriever

    retriever = NativeRetriever(model=model, store=langchain_store, k=3)
    queries = [*QUESTIONS, CONVERSATION, {"messages": convert_to_messages(CONVERSATION)}]
    wanted = [retriever.invoke(query) for query in queries]
    assert [document.page_content for document in wanted[2]] == nearest and wanted[2] == wanted[3]
    assert retriever.batch(queries) == asyncio.run(retriever.abatch(queries)) == wanted
    prompt = ChatPromptTemplate([("placeholder", "{history}"), ("human", "{question}")])
    asked = {"history": CONVERSATION[:2], "question": CONVERSATION[2]["content"]}
    assert (prompt | retriever).invoke(asked) == asyncio.run((prompt | retriever).ainvoke(asked)) == wanted[2]
    assert (PromptTemplate.from_template("{question}") | retriever).invoke({"question": QUESTIONS[0]}) == wanted[0]
    assert (retriever | (lambda found: found[0])).invoke(CONVERSATION) == wanted[2][0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": -3}, "k is -3"),
        ({"k": "many"}, "k"),
        ({"search_kwargs": {"k": 0}}, "k is 0"),
        ({"search_kwargs": {"k": None}}, "k is None"),
        ({"search_kwargs": None}, "search_kwargs"),
        ({"serch_kwargs": {}}, "'serch_kwargs'"),
        ({"filter": {}}, "'filter'"),
        ({"search_type": "hybrid"}, "'hybrid'"),
        ({"search_type": "similarity_score_threshold"}, "score_threshold is None"),
        ({"search_type": "similarity_score_threshold", "search_kwargs": {"score_threshold": "high"}}, "'high'"),
        ({"search_kwargs": {"fliter": {}}}, "did you mean 'filter'"),
        ({"store": "a store"}, "store"),
    ],
    ids=str,
)
def test_a_wrong_field_is_refused_in_one_line(langchain_store, model, fields, said):
    from native_retrieval.integrations.langchain import NativeRetriever

    with pytest.raises(ValueError) as error:
        NativeRetriever(**{"model": model, "store": langchain_store, **fields})
    assert_one_line(error)
    assert said in str(error.value)


@pytest.mark.parametrize(("arguments", "said"), [({"k": 0}, "k is 0"), ({"fliter": {}}, "'fliter'")], ids=str)
def test_a_wrong_argument_of_a_call_is_refused_in_one_line(langchain_store, model, arguments, said):
    from native_retrieval.integrations.langchain import NativeRetriever

    retriever = NativeRetriever(model=model, store=langchain_store)
    for call in (retriever.invoke, lambda *args, **kwargs: asyncio.run(retriever.ainvoke(*args, **kwargs))):
        with pytest.raises(ValueError) as error:
            call(CONVERSATION, **arguments)
        assert_one_line(error)
        assert said in str(error.value)


def test_what_a_store_does_not_offer_is_refused_in_one_line(model):
    pytest.importorskip("langchain_core")
    from langchain_core.documents import Document
    from langchain_core.vectorstores import VectorStore

    from native_retrieval.integrations.langchain import NativeRetriever

    class Bare(VectorStore):
        def similarity_search(self, query, k=4, **kwargs):
            return []

        @classmethod
        def from_texts(cls, texts, embedding, metadatas=None, **kwargs):
            return cls()

    class Distances(Bare):
        """Chroma's way: distances from a method that promises relevance, and a function that turns them."""

        def similarity_search_by_vector_with_relevance_scores(self, embedding, k=4, filter=None, **kwargs):
            return [(Document("near"), 0.1), (Document("far"), 0.9)][:k]

        def _select_relevance_score_fn(self):
            return lambda distance: 1 - distance

    arguments = {"score_threshold": 0.5}
    for search_type in ("similarity", "mmr", "similarity_score_threshold"):
        kwargs = arguments if "score" in search_type else {}
        for call in ("invoke", "ainvoke"):
            with pytest.raises(ValueError, match=f"Bare has no search of type '{search_type}'") as error:
                retriever = NativeRetriever(model=model, store=Bare(), search_type=search_type, search_kwargs=kwargs)
                found = getattr(retriever, call)(CONVERSATION)
                asyncio.run(found)
            assert_one_line(error)
    retriever = NativeRetriever(
        model=model, store=Distances(), search_type="similarity_score_threshold", search_kwargs=arguments
    )
    assert [document.page_content for document in retriever.invoke(CONVERSATION)] == ["near"]
    assert [document.page_content for document in asyncio.run(retriever.ainvoke(CONVERSATION))] == ["near"]


def test_langchain_searches_by_text(langchain_store, model):
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    from native_retrieval.integrations.langchain import NativeRetriever

    class Words(BaseRetriever):
        """Stands for BM25Retriever: the documents, and what they were asked with."""

        def _get_relevant_documents(self, query, *, run_manager):
            return [Document(query), Document("second"), Document("third")]

    text = model.extract_query(CONVERSATION)
    assert text.startswith(CONVERSATION[-1]["content"])
    retriever = NativeRetriever(model=model, store=langchain_store, search="text", k=3)
    wanted = langchain_store.similarity_search(text, k=3)
    assert retriever.invoke(CONVERSATION) == asyncio.run(retriever.ainvoke(CONVERSATION)) == wanted
    assert retriever.invoke(CONVERSATION, k=1) == wanted[:1]
    words = NativeRetriever(model=model, store=Words(), search="text", k=2)
    for found in (words.invoke(CONVERSATION), asyncio.run(words.ainvoke(CONVERSATION))):
        assert [document.page_content for document in found] == [text, "second"]
    for fields, said in (
        ({"search": "words"}, "'words'"),
        ({"store": Words(), "search": "vector"}, "search='text'"),
        ({"store": Words(), "search_kwargs": {"filter": {}}}, "give 'filter' to it"),
        ({"store": Words(), "search_type": "mmr"}, "give 'search_type' to it"),
        ({"search_kwargs": {"fliter": {}}}, "did you mean 'filter'"),
    ):
        with pytest.raises(ValueError) as error:
            NativeRetriever(**{"model": model, "store": langchain_store, "search": "text", **fields})
        assert_one_line(error)
        assert said in str(error.value)


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
    by_text = retriever.retrieve(QUESTIONS[0])
    found = [found.text for found in retriever.retrieve(embeddings.query(QUESTIONS[0]))]
    assert found == [node.text for node in by_text]
    assert [found.text for found in asyncio.run(retriever.aretrieve(embeddings.query(messages)))] == nearest
    assert [found.text for found in asyncio.run(retriever.aretrieve(QUESTIONS[0]))] == [node.text for node in by_text]
    top = index.as_retriever(similarity_top_k=1000)
    assert len(top.retrieve(embeddings.query(messages))) == len(corpus)


def test_conversations_and_messages_of_any_shape_are_queries(model):
    pytest.importorskip("llama_index.core")
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.memory import ChatMemoryBuffer

    from native_retrieval.integrations.llama_index import NativeRetrievalEmbeddings, conversation_of

    embeddings = NativeRetrievalEmbeddings(model)
    messages = [ChatMessage(role=turn["role"], content=turn["content"]) for turn in CONVERSATION]
    wanted = model.embed_query(CONVERSATION)[0].tolist()
    memory = ChatMemoryBuffer.from_defaults(chat_history=messages, token_limit=1000, tokenizer_fn=str.split)
    spellings = {
        "messages": messages,
        "a tuple": tuple(messages),
        "dicts": CONVERSATION,
        "dumped": [message.model_dump() for message in messages],
        "dumped as JSON": [json.loads(message.model_dump_json()) for message in messages],
        "mixed": [messages[0], *CONVERSATION[1:]],
        "a state": {"messages": messages},
        "a memory": memory.get(),
    }
    for name, spelling in spellings.items():
        assert conversation_of(spelling) == CONVERSATION, name
        query = embeddings.query(spelling)
        assert np.allclose(query.embedding, wanted, atol=1e-6) and query.query_str == CONVERSATION[-1]["content"]
    single = model.embed_query(QUESTIONS[0])[0].tolist()
    message = ChatMessage(role="user", content=QUESTIONS[0])
    for spelling in (QUESTIONS[0], message, [message], {"role": "user", "content": QUESTIONS[0]}):
        for query in (embeddings.query(spelling), asyncio.run(embeddings.aquery(spelling))):
            assert np.allclose(query.embedding, single, atol=1e-6) and query.query_str == QUESTIONS[0]


def test_llama_index_searches_by_text(model):
    pytest.importorskip("llama_index.core")
    from native_retrieval.integrations.llama_index import NativeRetrievalEmbeddings

    embeddings, text = NativeRetrievalEmbeddings(model), model.extract_query(CONVERSATION)
    for query in (embeddings.query(CONVERSATION, "text"), asyncio.run(embeddings.aquery(CONVERSATION, search="text"))):
        assert query.query_str == text and query.embedding is None
    with pytest.raises(ValueError, match="wanted 'vector' or 'text'") as error:
        embeddings.query(CONVERSATION, search="words")
    assert_one_line(error)


def test_blocks_of_llama_index_are_read():
    pytest.importorskip("llama_index.core")
    from llama_index.core.base.llms import types
    from llama_index.core.schema import Document, NodeWithScore, TextNode

    from native_retrieval.integrations.llama_index import conversation_of

    blocks = [
        types.ThinkingBlock(content="Hm."),
        types.TextBlock(text="Who painted"),
        types.TextBlock(text="Guernica?"),
        types.ImageBlock(url="https://example.com/guernica.png"),
        types.AudioBlock(url="https://example.com/a.wav"),
        types.DocumentBlock(url="https://example.com/a.pdf"),
        types.CitableBlock(title="Malaga", source="guide", content=[types.TextBlock(text="A port.")]),
        types.CachePoint(cache_control=types.CacheControl(type="ephemeral")),
        types.ToolCallBlock(tool_call_id="1", tool_name="search", tool_kwargs={"query": "Guernica"}),
    ]
    text = "Who painted\nGuernica?\n[image]\n[audio]\n[document]\nMalaga\nA port."
    call = {"type": "function", "id": "1", "function": {"name": "search", "arguments": '{"query": "Guernica"}'}}
    message = types.ChatMessage(role="assistant", blocks=blocks)
    assert conversation_of(message) == [{"role": "assistant", "content": text, "tool_calls": [call]}]
    old = types.ChatMessage(role="assistant", content=None, additional_kwargs={"tool_calls": [call]})
    assert conversation_of(old) == [{"role": "assistant", "content": "", "tool_calls": [call]}]
    result = types.ChatMessage(
        role="tool", content="A port.", additional_kwargs={"tool_call_id": "1", "name": "search"}
    )
    assert conversation_of(result) == [{"role": "tool", "content": "A port.", "tool_call_id": "1", "name": "search"}]
    nodes = [NodeWithScore(node=TextNode(text="A port."), score=1.0), Document(text="A painting.")]
    assert conversation_of({"role": "tool", "content": nodes})[0]["content"] == "A port.\nA painting."


@pytest.mark.parametrize(
    "query", [None, 7, [], {}, {"messages": []}, [None], [{"content": "Who?"}], "", b"Who?"], ids=repr
)
def test_what_is_no_query_of_llama_index_is_refused_in_one_line(model, query):
    pytest.importorskip("llama_index.core")
    from native_retrieval.integrations.llama_index import NativeRetrievalEmbeddings

    embeddings = NativeRetrievalEmbeddings(model)
    for call in (embeddings.query, lambda query: asyncio.run(embeddings.aquery(query))):
        with pytest.raises(ValueError) as error:
            call(query)
        assert_one_line(error)
        assert "Who?" not in str(error.value)


def test_an_unknown_field_of_the_embeddings_is_refused(model):
    pytest.importorskip("llama_index.core")
    from native_retrieval.integrations.llama_index import NativeRetrievalEmbeddings

    with pytest.raises(ValueError, match="'techer'") as error:
        NativeRetrievalEmbeddings(model, techer="a-teacher")
    assert_one_line(error)
    assert NativeRetrievalEmbeddings(model, embed_batch_size=7, model_name="ours").model_name == "ours"
