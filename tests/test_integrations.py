"""At home in other libraries: sentence-transformers, mteb, LangChain, LlamaIndex; each the real package."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as eval_script
from modeling_native_retrieval import NativeRetrievalModel
from native_retrieval import export
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


@pytest.fixture(scope="module")
def model_dir(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert export.main([str(model_dir), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def sentence_transformer(exported):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(exported), trust_remote_code=True, device="cpu")


def cosines(a, b) -> np.ndarray:
    return (np.asarray(a) * np.asarray(b)).sum(-1)


# -- sentence-transformers ----------------------------------------------------------------------------------------------


def test_encode_query_is_embed_query(sentence_transformer, model):
    queries = [*QUESTIONS, CONVERSATION]
    wanted = torch.cat([model.embed_query(QUESTIONS), model.embed_query(CONVERSATION)])
    assert (cosines(sentence_transformer.encode_query(queries), wanted) > 0.99999).all()
    assert cosines(sentence_transformer.encode_query(CONVERSATION), wanted[2]) > 0.99999
    assert (cosines(sentence_transformer.encode_query(QUESTIONS, batch_size=1), wanted[:2]) > 0.99999).all()


def test_documents_are_the_teachers(sentence_transformer, teacher_dir):
    wanted = Teacher(str(teacher_dir)).encode(QUESTIONS, "document")
    assert np.allclose(sentence_transformer.encode_document(QUESTIONS), wanted, atol=1e-6)
    assert np.allclose(sentence_transformer.encode(QUESTIONS), wanted, atol=1e-6), "documents are the default"


def test_prompts_similarity_and_truncation(sentence_transformer, model):
    prompted = sentence_transformer.encode_query(QUESTIONS, prompt="Find: ")
    assert (cosines(prompted, model.embed_query([f"Find: {text}" for text in QUESTIONS])) > 0.99999).all()
    assert sentence_transformer.encode_query(CONVERSATION, truncate_dim=16).shape == (16,)
    queries, documents = sentence_transformer.encode_query(QUESTIONS), sentence_transformer.encode_document(QUESTIONS)
    assert sentence_transformer.similarity_fn_name == "cosine"
    assert np.allclose(sentence_transformer.similarity(queries, documents), queries @ documents.T, atol=1e-5)
    assert sentence_transformer.get_embedding_dimension() == 32


def test_it_is_saved_and_loaded_again(sentence_transformer, tmp_path):
    from sentence_transformers import SentenceTransformer

    sentence_transformer.save(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert np.allclose(again.encode_query(CONVERSATION), sentence_transformer.encode_query(CONVERSATION), atol=1e-6)


def test_a_fresh_process_without_the_project_loads_it(exported, sentence_transformer, tmp_path):
    script = (
        "import json, sys; from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device='cpu')\n"
        "assert 'native_retrieval' not in sys.modules\n"
        "print(json.dumps(model.encode_query([json.loads(sys.argv[2])])[0].tolist()))"
    )
    words = [sys.executable, "-c", script, str(exported), json.dumps(CONVERSATION)]
    process = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    vector = json.loads(process.stdout.splitlines()[-1])
    assert cosines(vector, sentence_transformer.encode_query(CONVERSATION)) > 0.99999


def test_sentence_transformers_own_evaluator(sentence_transformer, beir_data):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    task = load_task(beir_data, "test")
    evaluator = InformationRetrievalEvaluator(
        dict(zip(task.queries["_id"], task.queries["messages"], strict=True)),
        {row["_id"]: f"{row['title']} {row['text']}" for row in task.corpus},
        {query: set(judged) for query, judged in task.qrels.items()},
        name="beir",
    )
    assert 0 < evaluator(sentence_transformer)["beir_cosine_ndcg@10"] <= 1


@pytest.mark.parametrize("words, said", [(["nowhere", "new"], "nowhere"), (["{model}", "{full}"], "new or empty")])
def test_export_says_what_is_wrong_in_one_line(words, said, model_dir, beir_data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main([word.format(model=model_dir, full=beir_data) for word in words]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_teacher_is_refused(make_model, teacher_dir):
    stranger = make_model(teacher_name_or_path=str(teacher_dir), teacher_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="fingerprint"):
        export.to_sentence_transformer(stranger)


# -- mteb ---------------------------------------------------------------------------------------------------------------


def test_mteb_gives_the_same_ndcg_as_eval(sentence_transformer, model_dir, beir_data, tmp_path, capsys):
    mteb = pytest.importorskip("mteb")
    from native_retrieval.integrations.mteb import ConversationEncoder, retrieval_task

    result = mteb.evaluate(ConversationEncoder(sentence_transformer), retrieval_task(beir_data, "test"), cache=None)
    words = ["--model", model_dir, "--data", beir_data, "--output", tmp_path / "test.json", "--cache_dir", tmp_path]
    words += ["--latency_queries", "0", "--methods", "generate-then-encode", "native-context"]
    assert eval_script.main([str(word) for word in words]) == 0, capsys.readouterr().err
    ours = json.loads((tmp_path / "test.json").read_text())["methods"]["native-context"]["ndcg@10"]
    assert result.task_results[0].get_score() == pytest.approx(ours, abs=5e-5)


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
