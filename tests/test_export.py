"""The sentence-transformers export, and mteb, which takes it."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_native_retrieval import NativeRetrievalModel
from native_retrieval import export
from native_retrieval.data import load_task
from native_retrieval.integrations.native_query import NativeQuery, NativeRouter
from native_retrieval.teacher import Teacher

CONVERSATION = [
    {"role": "user", "content": "When was Arnwick Lighthouse founded?"},
    {"role": "assistant", "content": "Arnwick Lighthouse was founded in 1874."},
    {"role": "user", "content": "Who was behind it?"},
]
QUESTIONS = ["Who founded Belford Museum?", "What is the Carrow Railway known for?"]
TOOLS = [{"type": "function", "function": {"name": "search", "description": "Finds documents.", "parameters": {}}}]
QUERIES = [*QUESTIONS, CONVERSATION, {"messages": CONVERSATION, "tools": TOOLS}]
LONG = [{"role": "user", "content": "Tell me about the old bridge. " * 20}, *CONVERSATION]


@pytest.fixture(scope="module")
def model(make_taught_model, teacher_dir) -> NativeRetrievalModel:
    model, _ = make_taught_model()
    model.config.teacher_name_or_path = teacher_dir.name  # as training publishes it
    return model


@pytest.fixture(scope="module")
def model_dir(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(model_dir, teacher_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert export.main([str(model_dir), str(folder), "--teacher", str(teacher_dir)]) == 0
    return folder


def load(folder: Path, **kwargs) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, **{"device": "cpu", **kwargs})


@pytest.fixture(scope="module")
def loaded(exported) -> SentenceTransformer:
    """Not to be changed."""
    return load(exported)


@pytest.fixture
def fresh(exported) -> SentenceTransformer:
    return load(exported)


def cosines(a, b) -> np.ndarray:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def assert_same(seen: SentenceTransformer, wanted: SentenceTransformer, least: float = 0.99999) -> None:
    assert (cosines(seen.encode_query(QUERIES), wanted.encode_query(QUERIES)) > least).all()
    assert (cosines(seen.encode_document(QUESTIONS), wanted.encode_document(QUESTIONS)) > least).all()


# -- queries and documents ----------------------------------------------------------------------------------------------


def test_encode_query_equals_embed_query(loaded, model):
    wanted = [model.embed_query([query]) for query in QUERIES]
    assert (cosines(loaded.encode_query(QUERIES), torch.cat(wanted)) > 0.99999).all()
    assert (cosines(loaded.encode_query(QUERIES, batch_size=1), torch.cat(wanted)) > 0.99999).all()
    for query, vector in zip(QUERIES, wanted, strict=True):
        assert cosines(loaded.encode_query(query), vector[0]) > 0.99999, "alone"


def test_messages_of_agents_are_encoded(loaded, model):
    call = {"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"q": "the museum"}'}}
    messages = [
        {"role": "developer", "content": "Search first."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Who founded it?"}, {"type": "image_url", "image_url": {}}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Jonas Pike.", "tool_call_id": "1"},
    ]
    assert cosines(loaded.encode_query([messages])[0], model.embed_query([messages])[0]) > 0.99999


def test_documents_are_the_teachers(loaded, teacher_dir):
    wanted = Teacher(str(teacher_dir)).encode(QUESTIONS, "document")
    assert np.allclose(loaded.encode_document(QUESTIONS), wanted, atol=1e-6)
    assert np.allclose(loaded.encode(QUESTIONS), wanted, atol=1e-6), "documents are the default"


def test_prompts_similarity_and_truncation(loaded, model):
    prompted = loaded.encode_query(QUESTIONS, prompt="Find: ")
    assert (cosines(prompted, model.embed_query([f"Find: {text}" for text in QUESTIONS])) > 0.99999).all()
    asked = [*CONVERSATION[:-1], {"role": "user", "content": "Find: Who was behind it?"}]
    assert cosines(loaded.encode_query(CONVERSATION, prompt="Find: "), model.embed_query(asked)[0]) > 0.99999
    assert loaded.encode_query(CONVERSATION, truncate_dim=16).shape == (16,)
    queries, documents = loaded.encode_query(QUESTIONS), loaded.encode_document(QUESTIONS)
    assert loaded.similarity_fn_name == "cosine"
    assert np.allclose(loaded.similarity(queries, documents), queries @ documents.T, atol=1e-5)
    assert loaded.get_embedding_dimension() == 32


@pytest.mark.parametrize(
    "query", ["", [], [{"role": "user"}], [{"role": "nobody", "content": "Who?"}], {"messages": []}]
)
def test_a_malformed_query_is_refused_in_one_line(loaded, query):
    with pytest.raises(ValueError) as error:
        loaded.encode_query([query])
    assert "\n" not in str(error.value)


def test_sentence_transformers_own_evaluator(loaded, beir_data):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    task = load_task(beir_data, "test")
    evaluator = InformationRetrievalEvaluator(
        dict(zip(task.queries["_id"], task.queries["messages"], strict=True)),
        {row["_id"]: f"{row['title']} {row['text']}" for row in task.corpus},
        {query: set(judged) for query, judged in task.qrels.items()},
        name="beir",
    )
    assert 0 < evaluator(loaded)["beir_cosine_ndcg@10"] <= 1


# -- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_other_precisions_give_nearly_the_same_vectors(convert, fresh, loaded):
    assert_same(convert(fresh), loaded, least=0.999)


@pytest.mark.parametrize("place", ["auto", "balanced", "sequential", "cpu", {"": "cpu"}])
def test_a_device_map_is_taken(place, exported, loaded):
    assert_same(load(exported, device=None, model_kwargs={"device_map": place}), loaded)


def test_model_kwargs_concern_the_backbone(exported, loaded):
    model = load(exported, model_kwargs={"dtype": torch.bfloat16, "attn_implementation": "eager"})
    backbone = model[0].sub_modules["query"][0].model.backbone
    assert backbone.dtype == torch.bfloat16 and backbone.config._attn_implementation == "eager"
    assert_same(model, loaded, least=0.99)


def test_config_kwargs_are_set(exported, model):
    written = load(exported, config_kwargs={"query_mode": "generated"})
    assert cosines(written.encode_query(CONVERSATION), model.embed_query(CONVERSATION, mode="generated")[0]) > 0.99999


@pytest.mark.parametrize("name", ["max_prompt_tokens", "model_max_length"])
def test_processor_kwargs_are_set(name, exported, fresh):
    model = load(exported, processor_kwargs={name: 60})
    fresh.max_seq_length = 60
    assert model.max_seq_length == 60
    assert_same(model, fresh)
    assert cosines(model.encode_query(LONG), fresh.encode_query(LONG)) > 0.99999


def test_arguments_of_the_chat_template_reach_it(fresh):
    template = "{{ style }}: {% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    before = fresh.encode_query(CONVERSATION)
    fresh.tokenizer.chat_template = template
    terse, long = (
        fresh.encode_query(CONVERSATION, processing_kwargs={"chat_template": {"style": style}})
        for style in ("terse", "at great length")
    )
    assert cosines(terse, long) < 0.99999 and cosines(terse, before) < 0.99999


def test_max_seq_length_limits_prompts(fresh, loaded):
    prompts = fresh.preprocess([LONG], task="query")["input_ids"]
    assert fresh.max_seq_length == loaded.max_seq_length
    fresh.max_seq_length = 60
    assert fresh.max_seq_length == 60 and fresh.get_max_seq_length() == 60
    assert fresh.preprocess([LONG], task="query")["input_ids"].shape[1] <= 60 < prompts.shape[1]
    assert cosines(fresh.encode_query(LONG), loaded.encode_query(LONG)) < 0.99999
    with pytest.raises(ValueError, match="max_seq_length=0"):
        fresh.max_seq_length = 0


def test_max_seq_length_limits_documents(model):
    class Documents(torch.nn.Module):
        max_seq_length = 256

    documents = Documents()
    router = NativeRouter.for_query_document([NativeQuery(copy.deepcopy(model))], [documents])
    router.max_seq_length = 128
    assert router.max_seq_length == documents.max_seq_length == 128


# -- processes, pickles, folders ----------------------------------------------------------------------------------------


def test_it_pickles_with_its_state(fresh, loaded):
    assert_same(pickle.loads(pickle.dumps(fresh)), loaded)
    fresh.encode_query(QUESTIONS)
    assert_same(pickle.loads(pickle.dumps(fresh)), loaded)
    assert_same(copy.deepcopy(fresh), loaded)
    fresh.max_seq_length = 60
    again = pickle.loads(pickle.dumps(fresh.half()))
    assert again.max_seq_length == 60 and again.dtype == torch.float16
    assert np.array_equal(again.encode_query(LONG), fresh.encode_query(LONG))
    assert type(again[0].sub_modules["query"][0]) is type(fresh[0].sub_modules["query"][0])


def in_a_new_process(script: str, *words: str, **settings) -> str:
    """What a Python process prints that knows nothing of this project."""
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_process_without_the_project_loads_it(exported, loaded, tmp_path):
    script = (
        "import json, sys; from sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device='cpu')\n"
        "assert 'native_retrieval' not in sys.modules\n"
        "print(json.dumps(model.encode_query([json.loads(sys.argv[2])])[0].tolist()))"
    )
    vector = json.loads(in_a_new_process(script, str(exported), json.dumps(CONVERSATION), cwd=tmp_path))
    assert cosines(vector, loaded.encode_query(CONVERSATION)) > 0.99999


def test_a_pickle_loads_in_another_process_without_the_folder(exported, loaded, tmp_path):
    shutil.copytree(exported, tmp_path / "moved")
    model = load(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    script = (
        "import json, pickle, sys; model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(json.dumps(model.encode_query([json.loads(sys.argv[2])])[0].tolist()))"
    )
    vector = json.loads(in_a_new_process(script, "model.pickle", json.dumps(CONVERSATION), cwd=tmp_path))
    assert cosines(vector, loaded.encode_query(CONVERSATION)) > 0.99999


def test_many_processes_encode_queries_and_documents(fresh, loaded):
    fresh.encode_query(QUESTIONS)
    fresh.max_seq_length = 60
    queries = [*QUERIES, LONG]
    pool = fresh.start_multi_process_pool(["cpu", "cpu"])
    try:
        seen = fresh.encode_query(queries, pool=pool, chunk_size=2)
        documents = fresh.encode_document(QUESTIONS, pool=pool)
        by_task = fresh.encode(queries, task="query", pool=pool)
    finally:
        fresh.stop_multi_process_pool(pool)
    wanted = fresh.encode_query(queries)
    assert (cosines(seen, wanted) > 0.99999).all() and (cosines(by_task, wanted) > 0.99999).all()
    assert np.allclose(documents, loaded.encode_document(QUESTIONS), atol=1e-6)


def test_it_is_saved_and_loaded_again(fresh, tmp_path):
    fresh.max_seq_length = 60
    fresh.save(str(tmp_path / "first"))
    again = load(tmp_path / "first")
    assert again.max_seq_length == 60
    again.save(str(tmp_path / "second"))
    assert_same(load(tmp_path / "second"), fresh)


def test_the_folder_holds_one_ordinary_backbone(exported, model):
    (folder,) = {path.parent for path in exported.rglob("*.safetensors") if path.parent.name == "backbone"}
    backbone, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == model.processor.tokenizer.chat_template
    weights = model.backbone.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in backbone.state_dict().items())


def test_what_is_only_on_this_machine_is_exported_without_its_path(model, teacher_dir, tmp_path):
    model = copy.deepcopy(model)
    model.backbone.to(torch.bfloat16).save_pretrained(tmp_path / "here" / "llm")
    model.config.update({"store_backbone": False, "backbone_name_or_path": "llm"})
    model.save_pretrained(tmp_path / "here" / "model")
    local = {"backbone": str(tmp_path / "here" / "llm"), "teacher": str(teacher_dir)}
    (tmp_path / "here" / "model" / "_local.json").write_text(json.dumps(local))
    assert export.main([str(tmp_path / "here" / "model"), str(tmp_path / "exported")]) == 0
    shutil.rmtree(tmp_path / "here")
    exported = load(tmp_path / "exported", model_kwargs={"dtype": "auto"})
    assert exported.transformers_model.backbone.dtype == torch.bfloat16, "in the precision that it is stored in"
    assert (cosines(exported.encode_query(QUERIES[:2]), model.embed_query(QUESTIONS)) > 0.999).all()
    for path in (tmp_path / "exported").rglob("*"):
        if path.suffix in (".json", ".md", ".py", ".jinja"):
            text = path.read_text()
            assert not any(str(folder) in text for folder in (tmp_path, teacher_dir.parent)), path


@pytest.mark.parametrize("words, said", [(["nowhere", "new"], "nowhere"), (["{model}", "{full}"], "new or empty")])
def test_export_says_what_is_wrong_in_one_line(words, said, model_dir, beir_data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export.main([word.format(model=model_dir, full=beir_data) for word in words]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_another_teacher_is_refused(make_model, teacher_dir):
    stranger = make_model(teacher_name_or_path=str(teacher_dir), teacher_fingerprint="0" * 64)
    with pytest.raises(ValueError, match="fingerprint"):
        export.to_sentence_transformer(stranger, str(teacher_dir))


# -- mteb ---------------------------------------------------------------------------------------------------------------


def test_mteb_ranks_by_the_vectors_of_embed_query(loaded, model, beir_data, teacher_dir):
    mteb = pytest.importorskip("mteb")
    from native_retrieval.integrations.mteb import ConversationEncoder, retrieval_task

    result = mteb.evaluate(ConversationEncoder(loaded), retrieval_task(beir_data, "test"), cache=None)
    task = load_task(beir_data, "test")
    documents = Teacher(str(teacher_dir)).encode([f"{row['title']} {row['text']}" for row in task.corpus], "document")
    gains = []
    for query, messages in zip(task.queries["_id"], task.queries["messages"], strict=True):
        scores = documents @ model.embed_query([messages])[0].numpy()
        (wanted,) = task.qrels[query]  # each query of this data has one document
        rank = 1 + int((scores > scores[task.corpus["_id"].index(wanted)]).sum())
        gains.append(1 / np.log2(rank + 1) if rank <= 10 else 0.0)
    assert result.task_results[0].get_score() == pytest.approx(np.mean(gains), abs=5e-5)
