"""Bad inputs at every public entry point, and what each of them answers.

    python tests/bad_inputs.py --output results/bad-inputs.json

runs `test_bad_inputs.py` over the table below and writes down the errors that it has seen.
"""

import argparse
import importlib
import os
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Before anything of Hugging Face is imported: a name that is not there is not looked for in the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import transformers

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


@dataclass
class World:
    """What the rows call: objects, and in the working directory folders of the same names."""

    model: Any  # model/; stranger/ is the same, but trained towards another teacher
    teacher: Any  # teacher/
    backbone: Any  # backbone/
    corpus: Any  # data/
    vectors: np.ndarray  # of the corpus
    index: Any  # index/


@dataclass(frozen=True)
class Row:
    """
    One bad input.

    Args:
        entry: the entry point.
        input: what is bad, in words.
        call: gives the input to it; a command returns its exit code, a server's part its error.
        says: what the error must hold: the thing, the value and the remedy.
        copy: a folder of the world that is copied to `bad/` before.
        files: written before, by path in the working directory.
    """

    entry: str
    input: str
    call: Callable[[World], Any]
    says: tuple[str, ...]
    copy: str | None = None
    files: dict[str, str | bytes] = field(default_factory=dict)

    def prepare(self) -> None:
        if self.copy:
            shutil.copytree(self.copy, "bad")
        for name, content in self.files.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def command(module: str, words: str, main: str = "main") -> Callable[[World], int]:
    """The command line of a module, called in this process."""
    return lambda world: getattr(importlib.import_module(module), main)(shlex.split(words))


def script(path: str, words: str) -> Callable[[World], None]:
    def call(world: World) -> None:
        with mock.patch.object(sys, "argv", [path, *shlex.split(words)]):
            runpy.run_path(str(REPOSITORY / path), run_name="__main__")

    return call


def page(question: str) -> Callable[[World], str]:
    """What the page of examples/app.py tells one who has asked this."""

    def call(world: World) -> str:
        gradio = pytest.importorskip("gradio")
        app = runpy.run_path(str(REPOSITORY / "examples" / "app.py"))
        functions = app["build_page"](world.model, world.teacher, world.index).fns.values()
        turn = next(function.fn for function in functions if function.name == "turn")
        with pytest.raises(gradio.Error) as error:
            next(turn(question, [], None))
        return error.value.message

    return call


def loads(loader: str, source: str, *words: str) -> Callable[[World], Any]:
    return lambda world: getattr(importlib.import_module("native_retrieval.data"), loader)(source, *words)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def embed(queries: Any, **arguments: Any) -> Callable[[World], Any]:
    return lambda world: world.model.embed_query(queries, **arguments)


def config(**fields: Any) -> Callable[[World], Any]:
    from configuration_native_retrieval import NativeRetrievalConfig

    return lambda world: NativeRetrievalConfig(**{"num_hidden_layers": 4, "head_num_layers": 1, **fields})


def from_backbone(backbone: Any = None, **arguments: Any) -> Callable[[World], Any]:
    from native_retrieval.initialise import from_backbone

    return lambda world: from_backbone(
        world.backbone if backbone is None else backbone,
        **{"tokenizer": world.model.tokenizer, "embedding_dim": 32, **arguments},
    )


def cache_of(world: World, *questions: str) -> Any:
    return world.model.embed_query(list(questions), return_cache=True).past_key_values


def index_class() -> Any:
    from native_retrieval.index import DocumentIndex

    return DocumentIndex


def build_index(**changes: Any) -> Callable[[World], Any]:
    """`DocumentIndex.build` with changed arguments; each change is a function of the world."""

    def call(world: World) -> Any:
        arguments = {
            "documents": world.corpus,
            "vectors": world.vectors,
            "teacher_fingerprint": world.teacher.fingerprint,
            "teacher_name": "teacher",
            "output_dir": "new-index",
        }
        return index_class().build(**arguments | {name: change(world) for name, change in changes.items()})

    return call


def search(vectors: Any, k: int = 3) -> Callable[[World], Any]:
    return lambda world: world.index.search(np.asarray(vectors, dtype=np.float32), k)


def qdrant(action: Callable[[World, Any, Any], Any]) -> Callable[[World], Any]:
    """`action(world, QdrantIndex, client)` with a client of nothing but a collection `theirs` and one `named`."""

    def call(world: World) -> Any:
        client_module = pytest.importorskip("qdrant_client")
        from native_retrieval.qdrant import QdrantIndex

        models, client = client_module.models, client_module.QdrantClient(location=":memory:")
        space = models.VectorParams(size=32, distance=models.Distance.COSINE)
        client.create_collection("theirs", vectors_config=space)
        client.create_collection("named", vectors_config={"a": space, "b": space})
        return action(world, QdrantIndex, client)

    return call


def build_qdrant(world: World, kind: Any, client: Any, collection: str = "ours", **changes: Any) -> Any:
    arguments = {"documents": world.corpus, "vectors": world.vectors, "fingerprint": world.teacher.fingerprint}
    documents, vectors, fingerprint = (arguments | changes).values()
    return kind.build(client, collection, documents, vectors, fingerprint, "teacher")


def agent(world: World, **arguments: Any) -> Any:
    from native_retrieval.agent import Agent

    return Agent(world.model, world.index, **arguments)


def vllm_integration() -> Any:
    """Our module, beside a vLLM of which there is nothing: it takes gigabytes, and an environment of its own."""
    names = ["vllm", "vllm.logger", *(f"vllm.distributed{part}" for part in ("", *VLLM_PARTS))]
    stubs = {name: mock.MagicMock() for name in names}
    stubs[names[-1]].ExampleHiddenStatesConnector = stubs[names[-2]].KVConnectorMetadata = object
    with mock.patch.dict(sys.modules, stubs):
        module = importlib.import_module("native_retrieval.integrations.vllm")
    sys.modules.pop("native_retrieval.integrations.vllm", None)
    return module


def serve(words: str) -> Callable[[World], int]:
    return lambda world: vllm_integration().main(shlex.split(words))


def request(max_prompt_tokens: int = 9, **asked: Any) -> Callable[[World], str]:
    """What our connector in vLLM answers to these `kv_transfer_params`, for a prompt of 9 tokens that passed in parts."""

    def call(world: World) -> str:
        vllm = vllm_integration()
        connector = vllm.NativeQueryConnector.__new__(vllm.NativeQueryConnector)
        connector.folder, connector.max_prompt_tokens = Path("nowhere"), max_prompt_tokens
        asking = SimpleNamespace(kv_transfer_params=asked, num_prompt_tokens=9, request_id="r")
        return connector.request_finished(asking, [])[1]["query_error"]

    return call


VLLM_PARTS = (
    ".kv_transfer",
    ".kv_transfer.kv_connector",
    ".kv_transfer.kv_connector.v1",
    ".kv_transfer.kv_connector.v1.base",
    ".kv_transfer.kv_connector.v1.example_hidden_states_connector",
)

TRAIN = "--backbone backbone --teacher teacher --train_data data --dev_data data --output_dir out --use_cpu true --max_prompt_tokens 100"
EVAL = "--model model --data data --output out.json --latency_queries 0"
QUESTION = [user("Who founded Belford Museum?")]


def train(words: str, *says: str, **more: Any) -> Row:
    return Row("train.py", words, script("train.py", f"{TRAIN} {words}"), says, **more)


def recipe(input: str, text: str | bytes, *says: str) -> Row:
    return Row("train.py RECIPE", input, script("train.py", "bad.yaml"), says, files={"bad.yaml": text})


def evaluate(words: str, *says: str, **more: Any) -> Row:
    return Row("eval.py", words, script("eval.py", f"{EVAL} {words}"), says, **more)


def module(name: str, words: str, *says: str, **more: Any) -> Row:
    place = f"native_retrieval.{name}" + (".__main__" if name == "synthesis" else "")
    return Row(f"python -m native_retrieval.{name}", words, command(place, words), says, **more)


def run(path: str, words: str, *says: str, **more: Any) -> Row:
    return Row(path, words, script(path, words), says, **more)


def data(loader: str, input: str, files: dict[str, str | bytes], *says: str, words: tuple[str, ...] = ()) -> Row:
    files = {f"bad/{name}": content for name, content in files.items()}
    return Row(loader, input, loads(loader, "bad", *words), says, files=files)


DOCUMENT = '{"_id": "d1", "text": "A text."}\n'
ASKED = '{"_id": "q1", "messages": [{"role": "user", "content": "Who?"}]}\n'
FEW_DOCUMENTS = {"bad/corpus.jsonl": DOCUMENT}

# fmt: off
ROWS = [
    Row("model.embed_query", "batch_size='many'", embed("Who?", batch_size="many"), ("batch_size='many'", "at least 1")),
    Row("model.embed_query", "token ids outside the vocabulary", embed(torch.tensor([[5, 99_999]])), ("99999", "vocabulary")),
    Row("model.embed_query", "token ids without tokens", embed(torch.zeros(1, 0, dtype=torch.long)), ("(1, 0)", "a token in each row")),
    Row("model.embed_query", "a cache of transformers' own", embed("Who?", past_key_values=transformers.DynamicCache()), ("past_key_values is a DynamicCache", "return_cache=True")),
    Row("model.embed_prompts", "a prompt without tokens", lambda w: w.model.embed_prompts([[5], []]), ("prompt 1", "at least one token")),
    Row("model.generate", "a mask of another shape", lambda w: w.model.generate(torch.tensor([[5, 6]]), past_key_values=cache_of(w, "a?"), attention_mask=torch.ones(1, 5, dtype=torch.long)), ("(1, 5)", "(1, 2)", "one shape")),
    Row("from_backbone", "a folder that is not there", from_backbone("nowhere"), ("backbone 'nowhere'", "cannot be loaded")),
    Row("from_backbone", "a misspelt field", from_backbone(head_dmi=256), ("head_dmi", "head_dim")),
    Row("NativeRetrievalConfig", "head_dim='big'", config(head_dim="big"), ("head_dim", "'big'")),
    Row("Teacher", "a folder that is not there", lambda w: importlib.import_module("native_retrieval.teacher").Teacher("nowhere"), ("the teacher 'nowhere'", "cannot be loaded")),
    train("--selection_heads 1.9", "selection_heads has [1, 9]", "heads 0 to 3"),
    train("--selection_heads 1-2", "'1-2'", "wanted LAYER.HEAD"),
    train("--read_words false", "read_words is false and head_num_layers 0", "change one"),
    train("--teacher nowhere", "the teacher 'nowhere'", "cannot be loaded"),
    evaluate("--teacher nowhere", "the teacher 'nowhere'", "cannot be loaded"),
    Row("DocumentIndex.build", "an unknown kind", build_index(kind=lambda w: ("Flt", "")), ("'Flt'", "HNSW32")),
    Row("index.check_model", "a model that knows no teacher", lambda w: w.index.check_model(stranger(w, None)), ("fingerprint None", "take a model of the index's teacher")),
    # Python: conversations and vectors
    Row("model.embed_query", "None", embed(None), ("queries is a NoneType", "give a string, a conversation")),
    Row("model.embed_query", "an empty string", embed(""), ("query 0", "empty")),
    Row("model.embed_query", "an unknown role", embed([{"role": "robot", "content": "Hi"}]), ("'robot'", "use one of system, developer")),
    Row("model.embed_query", "parts without text", embed([user([{"type": "text"}])]), ("message 0, is empty", "give the user's question")),
    Row("model.embed_query", "an empty last turn", embed([*QUESTION, user(" ")]), ("message 1, is empty", "give the user's question")),
    Row("model.embed_query", "strings and conversations", embed(["Who?", QUESTION]), ("queries mixes", "a list of one kind")),
    Row("model.embed_query", "a prompt over the limit, not to be cut", embed("word " * 600, truncation=False), ("max_prompt_tokens=", "shorten it")),
    Row("model.embed_query", "mode='psychic'", embed("Who?", mode="psychic"), ("mode='psychic'", "choose one of context, generated")),
    Row("model.embed_query", "batch_size=0", embed("Who?", batch_size=0), ("batch_size=0", "at least 1")),
    Row("model.embed_query", "numbers in the place of token ids", embed(torch.zeros(2)), ("(2,)", "token ids (batch, tokens)")),
    Row("model.extract_query", "None", lambda w: w.model.extract_query(None), ("queries is a NoneType", "give a string, a conversation")),
    Row("model.extract_query", "num_words=-1", lambda w: w.model.extract_query("Who?", num_words=-1), ("num_words=-1", "0 or more")),
    Row("model.extract_query", "a head that reads no words", lambda w: paper_head(w).extract_query("Who?"), ("word_vocab_size=None", "use a model with a word encoder")),
    Row("model.embed_query", "no queries, with a cache", embed([], return_cache=True), ("queries is empty", "at least one conversation")),
    Row("model.embed_query", "a cache of two conversations for one", lambda w: w.model.embed_query("Who?", past_key_values=cache_of(w, "a?", "b?")), ("holds 2 conversations", "1 are to go on")),
    Row("model.generate", "a cache of two conversations for one", lambda w: w.model.generate(torch.tensor([[5, 6]]), past_key_values=cache_of(w, "a?", "b?")), ("holds 2 conversations", "1 are to go on")),
    Row("model.forward", "a row without a token to read", lambda w: w.model(torch.tensor([[5, 6]]), readout_mask=torch.zeros(1, 2, dtype=torch.bool)), ("readout_mask", "mark at least one")),
    Row("model.forward", "hidden states of other tokens", lambda w: w.model(torch.tensor([[5, 6]]), hidden_states=torch.zeros(1, 3, 5, 32)), ("(1, 3)", "(1, 2)", "for the same tokens")),
    Row("processor.encode", "a string", lambda w: w.model.processor.encode("Who?"), ("conversation is a str", "give a list of {'role', 'content'}")),
    # Python: models and configurations
    Row("NativeRetrievalModel.from_pretrained", "a folder without a model", lambda w: type(w.model).from_pretrained("data"), ("no config.json", "the folder of a saved model")),
    Row("from_backbone", "a tokenizer larger than the backbone", lambda w: from_backbone(tokenizer=larger(w.model.tokenizer))(w), ("tokens, the backbone embeds only", "give the backbone's own tokenizer")),
    Row("from_backbone", "another width than the teacher's", lambda w: from_backbone(teacher=w.teacher, embedding_dim=48)(w), ("32 dimensions", "embedding_dim is 48", "leave embedding_dim out")),
    Row("NativeRetrievalConfig", "query_mode='psychic'", config(query_mode="psychic"), ("query_mode='psychic'", "choose one of")),
    Row("NativeRetrievalConfig", "head_dim=30 for 4 heads", config(head_dim=30, head_num_attention_heads=4), ("head_dim=30", "a multiple of head_num_attention_heads=4")),
    Row("NativeRetrievalConfig", "a layer that is not there", config(hidden_state_layers=[1, 9]), ("[9]", "0..4")),
    Row("NativeRetrievalConfig", "nothing to read", config(word_vocab_size=None, head_num_layers=0), ("word_vocab_size=None and head_num_layers=0", "set one of them")),
    Row("NativeRetrievalConfig", "encoder_dim=100", config(encoder_dim=100), ("encoder_dim=100", "a multiple of 32")),
    Row("NativeRetrievalConfig", "an attention head of a layer that is not read", config(hidden_state_layers=[1], selection_heads=[[2, 0]]), ("selection_heads [[2, 0]]", "leaves out")),
    Row("from_backbone", "an attention head that is not there", from_backbone(selection_heads=[[1, 9]]), ("selection_heads has [1, 9]", "heads 0 to 3")),
    Row("NativeRetrievalConfig", "head_dropout=1.0", config(head_dropout=1.0), ("head_dropout=1.0", "must lie in [0, 1)")),
    Row("NativeRetrievalConfig", "no backbone to fetch", config(store_backbone=False), ("store_backbone=False", "needs backbone_name_or_path")),
    Row("teacher_of", "a model of another teacher", lambda w: importlib.import_module("native_retrieval.teacher").teacher_of(stranger(w), "teacher"), ("'teacher'", "'another-teacher'", "--teacher")),
    # train.py
    train("--bakbone x", "'bakbone'", "did you mean backbone?"),
    train("stray", "'stray' belongs to no field", "--help"),
    train("--learning_rate fast", "learning_rate", "'fast'", "float"),
    train("--backbone nowhere", "'nowhere'"),
    train("--backbone data", "'data'"),
    train("--train_data nowhere", "nowhere", "no such folder"),
    train("--train_data data:tset", "data", "tset", "there is dev, test, train"),
    train("--dev_data data/corpus.jsonl", "data/corpus.jsonl"),
    train("--dev_data data data:test", "dev_data names data twice", "rename a folder"),
    train("--dev_data bad", "dev_data bad has no qrels/dev.tsv", "bad:SPLIT", files={"bad/corpus.jsonl": DOCUMENT, "bad/queries.jsonl": ASKED, "bad/qrels/test.tsv": "q1\td1\t1\n"}),
    train("--train_data data:test --dev_data data:test", "data:test has no query left", "6 are of conversations"),
    train("--query_modes generated --query_mode generated --generated_data data data:train --train_data data:train --dev_data data:dev", "generated_data ['data']", "spell it as there"),
    train("--plain_text text.csv", "text.csv", "must end in .txt", files={"text.csv": "a"}),
    train("--query_modes psychic", "'psychic'", "context, generated"),
    train("--query_modes generated", "query_mode=context", "set query_mode"),
    train("--query_modes context generated --generated_data logs", "generated_data ['logs']", "spell it as there"),
    train("--head_dim 30 --head_num_attention_heads 4", "head_dim=30", "a multiple of"),
    train("--hidden_state_layers 1 99", "[99]", "0..4"),
    train("--alignment_weight -1", "(-1.0, 1.0, 1.0)", "must not be negative"),
    train("--consistency_weight -1", "consistency_weight=-1.0", "must not be negative"),
    train("--eval_strategy never", "never is not a valid", "'epoch'"),
    train("--augmentation_share 2", "augmentation_share is 2.0", "0 to 1"),
    train("--topic_shift_share -1", "topic_shift_share is -1.0", "0 to 1"),
    train("--gold_share -1", "gold_share is -1.0", "0 to 1"),
    train("--rank_top_k 0", "rank_top_k is 0", "at least 2"),
    train("--contrastive_temperature 0", "contrastive_temperature is 0.0", "above 0"),
    train("--output_dir notes.txt/model", "notes.txt is a file", "name another place", files={"notes.txt": "a"}),
    train("--cache_dir notes.txt", "notes.txt is a file", "name another place", files={"notes.txt": "a"}),
    Row("train.py", "no backbone", script("train.py", "--teacher teacher"), ("backbone is missing", "--backbone")),
    Row("train.py", "a recipe that is not there", script("train.py", "nowhere.yaml"), ("nowhere.yaml does not exist", "configs/demo.yaml")),
    recipe("not YAML", "a: [1", "bad.yaml is not YAML"),
    recipe("a list", "- backbone", "bad.yaml holds a list", "`field: value`"),
    recipe("not UTF-8", b"backbone: \xff", "bad.yaml is not YAML in UTF-8"),
    recipe("a misspelt field", "learnin_rate: 1", "bad.yaml", "'learnin_rate'", "did you mean learning_rate?"),
    recipe("a mapping for a value", "backbone: {name: x}", "backbone holds {'name': 'x'}", "give a value"),
    recipe("a word for a number", "head_dim: wide", "head_dim", "'wide'", "int"),
    recipe("a word for a mapping", "accelerator_config: nowhere", "'nowhere'", "the mapping itself"),
    recipe("a flag in a list", "train_data: [data, --resume]", "train_data holds '--resume'", "give a value"),
    # eval.py
    evaluate("--modle x", "--modle", "did you mean --model?"),
    evaluate("stray", "'stray' belongs to no flag", "--help"),
    evaluate("--methods native-contxt", "'native-contxt'", "did you mean native-context?"),
    evaluate("--batch_size 0", "--batch_size is 0", "at least 1"),
    evaluate("--data nowhere", "nowhere", "no such folder"),
    evaluate("--split tset", "qrels/tset.tsv", "there is dev, test, train"),
    evaluate("--model nowhere", "nowhere", "is no folder"),
    evaluate("--model backbone", "'llama'", "'native_retrieval'", "that train.py wrote"),
    evaluate("--model bad", "bad", copy="model", files={"bad/model.safetensors": b"x" * 100}),
    evaluate("--model bad", "bad: model.safetensors is not as it was saved", "copy it again", copy="model", files={"bad/model.safetensors.sha256": "0" * 64}),
    evaluate("--model stranger --teacher teacher", "'another-teacher'", "--teacher"),
    evaluate("--index nowhere", "nowhere has no index.json", "pass a directory"),
    evaluate("--index bad", "bad/index.faiss: truncated or changed", "build it again", copy="index", files={"bad/index.faiss": b"x"}),
    evaluate("--output out.txt", "'out.txt'", "ends in .json"),
    evaluate("--figures notes.txt", "notes.txt is a file", "name another place", files={"notes.txt": "a"}),
    Row("eval.py", "no model", script("eval.py", "--data data --output out.json"), ("--model", "required")),
    # The other commands
    module("export", "model", "output", "required", "--help"),
    module("export", "nowhere exported", "nowhere", "is no folder"),
    module("export", "model data", "data exists", "name a new or empty directory"),
    module("export", "stranger exported --teacher teacher", "'another-teacher'", "--teacher"),
    module("export", "model exported --teachr x", "--teachr", "--help"),
    module("card", "nowhere", "nowhere/training.json is missing", "that train.py has saved"),
    module("card", "model results.json", "results.json"),
    module("card", "model notes.json", "notes.json is no JSON file", "make it again", files={"notes.json": "{"}),
    module("card", "model notes.json", "notes.json has no field 'dataset'", "eval.py", files={"notes.json": "{}"}),
    module("card", "bad", "bad/training.json is no JSON file", "make it again", copy="model", files={"bad/training.json": "{"}),
    module("card", "", "model", "required", "--help"),
    module("assets", "", "COMMAND", "required", "--help"),
    module("assets", "documents out --folder nowhere", "nowhere/wikipedia/corpus.jsonl", "fetch"),
    module("build_index", "--corpus nowhere --teacher teacher --output out", "nowhere", "no such folder"),
    module("build_index", "--corpus data --teacher teacher --output model", "model exists", "name another"),
    module("synthesis", "--corpus nowhere --output new", "nowhere", "expected a .jsonl"),
    module("synthesis", "--corpus data", "--output", "required"),
    module("synthesis", "--corpus data --output model", "model exists", "choose another"),
    module("synthesis", "--corpus data --output new --num_conversations 1", "num_conversations must be 3 or more", "1"),
    module("synthesis", "--corpus bad --output new", "Too few usable documents", "6 wanted", files=FEW_DOCUMENTS),
    module("synthesis", "--corpus bad --output new", "corpus.jsonl:1", "a JSON object is needed", files={"bad/corpus.jsonl": "[1]"}),
    module("synthesis", "--corpus bad --output new", "corpus.jsonl:1", "not UTF-8", files={"bad/corpus.jsonl": b"\xff"}),
    module("synthesis", "--corpus data --output new --llm nowhere", "--llm nowhere cannot be loaded"),
    module("synthesis", "--corpus data --output new --sede 3", "'--sede'", "--help"),
    module("results", "", "pages", "required", "--help"),
    module("results", "nowhere.md", "nowhere.md"),
    module("results", "page.md", "notes.json is no JSON file", "make it again", files={"page.md": "<!-- table: notes.json --><!-- end -->", "notes.json": "{"}),
    module("results", "page.md", "notes.json has no field 'rows'", files={"page.md": "<!-- rows: notes.json a --><!-- end -->", "notes.json": "{}"}),
    module("attributions", "--model model --data data --ids q99 --output words.png", "'q99' is not in data", "queries.jsonl"),
    module("attributions", "--model backbone --data data --output words.png", "'llama'", "that train.py wrote"),
    run("examples/quickstart.py", "nowhere index", "quickstart.py", "nowhere", "is no folder"),
    run("examples/quickstart.py", "model nowhere", "nowhere has no index.json", "pass a directory"),
    run("examples/quickstart.py", "stranger index", "'teacher'", "'another-teacher'", "take a model of the index's teacher"),
    run("examples/quickstart.py", "model index stray", "stray", "--help"),
    run("examples/agent.py", "nowhere index", "agent.py", "nowhere", "is no folder"),
    run("examples/agent.py", "stranger index", "'teacher'", "'another-teacher'", "take a model of the index's teacher"),
    run("examples/langgraph_agent.py", "model nowhere", "nowhere has no index.json", "pass a directory"),
    run("examples/langgraph_agent.py", "backbone index", "'llama'", "that train.py wrote"),
    run("examples/app.py", "--model nowhere", "app.py", "nowhere", "is no folder"),
    run("examples/app.py", "--model stranger --index index", "'another-teacher'", "take a model of the index's teacher"),
    run("examples/app.py", "--prot 80", "--prot", "--help"),
    run("benchmarks/ablation.py", "losses nowhere.yaml --output out.json", "nowhere.yaml does not exist", "configs/demo.yaml"),
    run("benchmarks/ablation.py", "lossess bad.yaml --output out.json", "'lossess'", "'losses', 'parts'"),
    run("benchmarks/corpus.py", "--corpus nowhere --output out.json", "nowhere", "no such folder"),
    run("benchmarks/corpus.py", "--corpus data --teacher nowhere --output out.json", "--teacher: nowhere", "name a sentence-transformers folder"),
    run("benchmarks/index.py", "--index nowhere --output out.json", "nowhere has no index.json", "pass a directory"),
    run("benchmarks/latency.py", "--model stranger --index index --output out.json", "'another-teacher'", "take a model of the index's teacher"),
    run("benchmarks/left_out.py", "bad.yaml --results results --output notes.json", "notes.json is no JSON file", "make it again", files={"bad.yaml": "", "notes.json": "{"}),
    run("benchmarks/load.py", "--model model --queries nowhere.jsonl --output out.json", "nowhere.jsonl", "no such file", "name a queries.jsonl"),
    run("benchmarks/load.py", "--model model --queries bad.jsonl --output out.json", "bad.jsonl:1: messages is missing", files={"bad.jsonl": '{"_id": "q1"}'}),
    run("benchmarks/robustness.py", "--model model --data data --method native --output out.json", "'native'", "'native-context'"),
    run("benchmarks/throughput.py", "--model model --data nowhere --output out.json", "nowhere", "no such folder"),
    run("benchmarks/training.py", "--backbone nowhere --teacher teacher --data data --output out.json", "backbone 'nowhere'", "cannot be loaded"),
    run("benchmarks/turn.py", "--model model --index nowhere --output out.json", "nowhere has no index.json", "pass a directory"),
    Row("app.py's page", "a question without words", page(" "), ("Ask something first",)),
    # Data files
    Row("load_corpus", "a folder that is not there", loads("load_corpus", "nowhere/at/all"), ("nowhere/at/all", "no such folder", "owner/name")),
    data("load_corpus", "a row that is not JSON", {"corpus.jsonl": DOCUMENT + "{"}, "corpus.jsonl:2: not valid JSON"),
    data("load_corpus", "the same id twice", {"corpus.jsonl": 2 * DOCUMENT}, "corpus.jsonl:2: duplicate _id 'd1'", "must be unique"),
    data("load_corpus", "not UTF-8", {"corpus.jsonl": b"\xff"}, "corpus.jsonl:1: not UTF-8", "0xff"),
    data("splits", "a split twice", {"qrels/test.tsv": "", "qrels/test.tsv.gz": ""}, "both qrels/test.tsv and qrels/test.tsv.gz", "keep one"),
    data("load_corpus", "gzip data without .gz", {"corpus.jsonl": b"\x1f\x8b\x08"}, "corpus.jsonl: holds gzip data", "must end in .gz"),
    data("load_corpus", "an empty file", {"corpus.jsonl": ""}, "corpus.jsonl: empty file"),
    data("load_queries", "a query with a text", {"queries.jsonl": '{"_id": "q", "text": "Who?"}'}, "queries.jsonl:1: messages is missing", 'write its text as [{"role": "user"'),
    data("load_queries", "an unknown role", {"queries.jsonl": ASKED.replace("user", "robot")}, "robot", "use one of system, developer"),
    data("load_queries", "half a turn number", {"queries.jsonl": ASKED.replace("}]}", '}], "metadata": {"turn": 1.5}}')}, "metadata.turn is 1.5", "wanted an integer"),
    data("load_qrels", "a split that is not there", {"qrels/dev.tsv": "q1\td1\t1\n"}, "qrels/test.tsv: no such split", "there is dev", words=("test",)),
    data("load_qrels", "half a score", {"qrels/test.tsv": "q1\td1\t0.5\n"}, "qrels/test.tsv:1: score '0.5' is not an integer", words=("test",)),
    data("load_task", "a judgement of an unknown document", {"corpus.jsonl": DOCUMENT, "queries.jsonl": ASKED, "qrels/test.tsv": "q1\td2\t1\n"}, "qrels/test.tsv:1: unknown document 'd2'", "no row of the corpus has this _id", words=("test",)),
    Row("load_texts", "a file of another kind", loads("load_texts", "bad.csv"), ("bad.csv", "must end in .txt"), files={"bad.csv": "a"}),
    # The index
    Row("DocumentIndex.build", "a vector of nan", build_index(vectors=lambda w: np.where(np.arange(len(w.vectors))[:, None] == 3, np.nan, w.vectors)), ("'d1_1' (row 3) has norm nan", "L2-normalise")),
    Row("DocumentIndex.build", "too few vectors", build_index(vectors=lambda w: w.vectors[:5]), ("(5, 32)", "wanted (30, dimension)", "one vector a document")),
    Row("DocumentIndex.build", "a folder with something else in it", build_index(output_dir=lambda w: "data", overwrite=lambda w: True), ("data exists and is no index", "pass another one")),
    Row("DocumentIndex.build", "an index that is there", build_index(output_dir=lambda w: "index"), ("index already holds an index", "overwrite=True")),
    Row("DocumentIndex.load", "a folder that is not there", lambda w: index_class().load("nowhere"), ("nowhere has no index.json", "pass a directory")),
    Row("DocumentIndex.load", "an index.json that is not JSON", lambda w: index_class().load("bad"), ("bad/index.json", "build it again"), copy="index", files={"bad/index.json": "{"}),
    Row("DocumentIndex.load", "an index.json without its fields", lambda w: index_class().load("bad"), ("bad/index.json", "build it again"), copy="index", files={"bad/index.json": "{}"}),
    Row("DocumentIndex.load", "an index.json without its checksums", lambda w: index_class().load("bad"), ("bad/index.json", "build it again"), copy="index", files={"bad/index.json": '{"format_version": 3}'}),
    Row("DocumentIndex.load", "a format of the future", lambda w: index_class().load("bad"), ("format_version is 99", "build it again"), copy="index", files={"bad/index.json": '{"format_version": 99}'}),
    Row("DocumentIndex.load", "a damaged FAISS file", lambda w: index_class().load("bad"), ("bad/index.faiss: truncated or changed", "build it again"), copy="index", files={"bad/index.faiss": b"x"}),
    Row("index.search", "k=0", search(np.eye(1, 32), 0), ("k is 0", "at least 1")),
    Row("index.search", "vectors of another width", search(np.eye(1, 8)), ("(1, 8)", "wanted (num_queries, 32)", "a model of this index's teacher")),
    Row("index.search", "a zero vector", search(np.zeros((1, 32))), ("Query vector 0 has norm 0.0", "has text")),
    Row("index.check_model", "a model of another teacher", lambda w: w.index.check_model(stranger(w)), ("'teacher'", "'another-teacher'", "build the index with the model's teacher")),
    Row("QdrantIndex.load", "a collection that is not there", qdrant(lambda w, kind, client: kind.load(client, "ours")), ("'ours' does not exist, there is named, theirs", "QdrantIndex.build")),
    Row("QdrantIndex.load", "a collection of someone else's", qdrant(lambda w, kind, client: kind.load(client, "theirs")), ("'theirs' does not say whose vectors", "QdrantIndex.attach")),
    Row("QdrantIndex.attach", "several named vectors", qdrant(lambda w, kind, client: kind.attach(client, "named", "00", "t")), ("'named' has several named vectors", "a single one")),
    Row("QdrantIndex.build", "too few vectors", qdrant(lambda w, kind, client: build_qdrant(w, kind, client, vectors=w.vectors[:5])), ("(5, 32)", "one vector a document")),
    Row("QdrantIndex.build", "a collection of someone else's", qdrant(lambda w, kind, client: build_qdrant(w, kind, client, "theirs")), ("'theirs' has format_version None", "name another collection")),
    Row("QdrantIndex.search", "k=0", qdrant(lambda w, kind, client: build_qdrant(w, kind, client).search(w.vectors[:1], 0)), ("k is 0", "at least 1")),
    # The agent, the integrations, and what is served
    Row("Agent", "num_documents=0", lambda w: agent(w, num_documents=0), ("num_documents=0", "at least 1")),
    Row("Agent.search", "an empty question", lambda w: agent(w).search(" "), ("is empty", "give the user's question")),
    Row("Agent.answer", "nothing asked before", lambda w: list(agent(w).answer()), ("no question to answer", "call search(question) first")),
    Row("langchain NativeRetrievalEmbeddings", "documents without a teacher", lambda w: integration("langchain", w).embed_documents(["a"]), ("no teacher", "pass teacher='teacher'")),
    Row("llama_index NativeRetrievalEmbeddings", "documents without a teacher", lambda w: integration("llama_index", w).get_text_embedding("a"), ("no teacher", "pass teacher='teacher'")),
    Row("python -m native_retrieval.integrations.vllm", "nowhere", serve("nowhere"), ("nowhere", "is no folder")),
    Row("python -m native_retrieval.integrations.vllm", "backbone", serve("backbone"), ("'llama'", "that train.py wrote")),
    Row("python -m native_retrieval.integrations.vllm", "", serve(""), ("model", "required", "--help")),
    Row("vLLM server", "a prompt that passed in parts", request(query_mode="context"), ("did not pass in one step", "without chunked prefill")),
    Row("vLLM server", "query_mode='psychic'", request(query_mode="psychic"), ("query_mode='psychic'", "choose one of context, generated")),
    Row("vLLM server", "num_query_tokens='many'", request(query_mode="generated", num_query_tokens="many"), ("num_query_tokens='many'", "from 1 to 9")),
    Row("vLLM server", "a conversation that the model would cut", request(8, query_mode="context"), ("9 tokens", "max_prompt_tokens=8", "oldest turns")),
    Row("vLLM server", "more query tokens than the prompt has", request(query_mode="generated", num_query_tokens=10), ("num_query_tokens=10", "from 1 to 9")),
    # Measures
    Row("per_query", "a query without a relevant document", lambda w: importlib.import_module("native_retrieval.metrics").per_query({}, {"q": {}}, ["q"]), ("'q' has no relevant document", "leave the query out")),
    Row("paired_bootstrap", "a single query", lambda w: importlib.import_module("native_retrieval.metrics").paired_bootstrap([1.0], [1.0]), ("1 queries", "wanted at least 2")),
]
# fmt: on


def larger(tokenizer: Any) -> Any:
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([f"token{i}" for i in range(10)])
    return tokenizer


def paper_head(world: World) -> Any:
    return from_backbone(word_vocab_size=None, head_num_layers=1)(world)


def stranger(world: World, fingerprint: str | None = "0" * 64) -> Any:
    """The configuration of a model that was trained towards another teacher."""
    fields = {"teacher_name_or_path": "another-teacher", "teacher_fingerprint": fingerprint, "teacher_revision": None}
    return SimpleNamespace(**fields, embedding_dim=32)


def integration(name: str, world: World) -> Any:
    pytest.importorskip({"langchain": "langchain_core", "llama_index": "llama_index.core"}[name])
    return importlib.import_module(f"native_retrieval.integrations.{name}").NativeRetrievalEmbeddings(world.model)


def answer(row: Row, world: World, printed: Callable[[], str]) -> tuple[str, int | None]:
    """
    The error, which is one line, and the exit code: None where no process ends.

    Args:
        printed: what has gone to stderr since it was asked last.
    """
    printed()
    code = None
    try:
        code = row.call(world)
    except SystemExit as end:
        code = end.code
    except (ValueError, OSError) as error:
        error = str(error)
        assert error and "\n" not in error, error
        return error, None
    if isinstance(code, str):  # what a server has said
        return code, None
    said = printed()
    assert code == 2, f"exit code {code}: {said}"
    assert "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.strip() and "%|" not in line]  # progress bars
    assert len(lines) == 1, said
    return lines[0], code


class Seen:
    """Keeps what the tests have recorded."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.rows += [value for name, value in report.user_properties if name == "row"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    seen = Seen()
    if code := pytest.main(["-q", str(Path(__file__).with_name("test_bad_inputs.py"))], plugins=[seen]):
        print("bad_inputs: the tests fail, and nothing was written", file=sys.stderr)
        return int(code)

    from native_retrieval.results import write_json

    write_json(
        {"command": f"python tests/bad_inputs.py --output {arguments.output}", "rows": seen.rows}, arguments.output
    )
    print(f"Written: {len(seen.rows)} rows to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
