"""A saved model loads anywhere, as it was, and tells when something under it has changed."""

import copy
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONVERSATIONS, assert_close, assert_one_line, take_steps
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from configuration_native_retrieval import NativeRetrievalConfig
from modeling_native_retrieval import NativeRetrievalModel

FRESH = """
import json, sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "native_retrieval" not in sys.modules
conversations = json.loads(sys.argv[2])
print(json.dumps([model.embed_query(conversations).tolist(), model.extract_query(conversations)]))
"""


@pytest.fixture
def trained(tiny_model) -> NativeRetrievalModel:
    take_steps(tiny_model)
    return tiny_model


@pytest.fixture
def saved(trained, tmp_path) -> Path:
    trained.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder, **arguments):
    return AutoModel.from_pretrained(str(folder), trust_remote_code=True, **arguments)


@pytest.fixture
def heard(caplog):
    """Whether the warning of the reference vector came; transformers' loggers do not propagate by themselves."""
    for name in ("transformers", "transformers_modules"):
        logging.getLogger(name).propagate = True
    return lambda: any("A fixed conversation's vector" in record.getMessage() for record in caplog.records)


def test_a_fresh_process_without_the_project_gives_the_same_vectors(trained, saved, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", FRESH, str(saved), json.dumps(CONVERSATIONS)]
    process = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    vectors, texts = json.loads(process.stdout.splitlines()[-1])
    assert_close(torch.tensor(vectors), trained.embed_query(CONVERSATIONS))
    assert texts == trained.extract_query(CONVERSATIONS) and max(map(len, texts)) > 40


def test_the_folder_holds_the_head_the_code_and_an_ordinary_backbone(trained, saved):
    root = {path.name for path in saved.iterdir()}
    assert {"config.json", "model.safetensors", "backbone", "word_tokenizer", "tokenizer.json"} <= root
    shipped = {f"{name}_native_retrieval.py" for name in ("cache", "checkpoint", "configuration", "head", "messages")}
    assert shipped | {"modeling_native_retrieval.py", "processing_native_retrieval.py"} <= root
    assert json.loads((saved / "config.json").read_text())["auto_map"].keys() == {"AutoConfig", "AutoModel"}
    backbone = AutoModelForCausalLM.from_pretrained(saved / "backbone")
    for name, weight in trained.backbone.state_dict().items():
        assert torch.equal(weight, backbone.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(saved / "backbone")("Who?") == trained.tokenizer("Who?")


def test_every_auto_class_loads_it(trained, saved):
    assert type(AutoConfig.from_pretrained(saved, trust_remote_code=True)).__name__ == "NativeRetrievalConfig"
    processor = AutoProcessor.from_pretrained(saved, trust_remote_code=True)
    assert processor.encode(CONVERSATIONS[1]) == trained.processor.encode(CONVERSATIONS[1])
    tokenizer = AutoTokenizer.from_pretrained(saved, trust_remote_code=True)
    assert tokenizer("Who?")["input_ids"] == trained.tokenizer("Who?")["input_ids"]


def test_saving_and_loading_twice_changes_nothing(trained, saved, tmp_path):
    load(saved).save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert_close(again.embed_query(CONVERSATIONS), trained.embed_query(CONVERSATIONS))
    for name, weight in trained.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_everything_is_read_before_it_returns(trained, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved.parent)
    model = load(saved.name)
    monkeypatch.chdir(tmp_path.parent)
    shutil.rmtree(saved)
    assert_close(model.embed_query(CONVERSATIONS), trained.embed_query(CONVERSATIONS))
    model.save_pretrained(tmp_path / "again")
    assert_close(load(tmp_path / "again").embed_query(CONVERSATIONS), trained.embed_query(CONVERSATIONS))


def test_a_subfolder_and_no_network(trained, saved):
    # transformers reads remote code at the root alone, so AutoModel finds none in a sub-folder.
    model = NativeRetrievalModel.from_pretrained(str(saved.parent), subfolder=saved.name, local_files_only=True)
    assert_close(model.embed_query(CONVERSATIONS), trained.embed_query(CONVERSATIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_precision_is_the_backbones_alone(dtype, trained, saved, heard):
    model = load(saved, dtype=dtype)
    assert {weight.dtype for weight in model.backbone.parameters()} == {dtype}
    assert {weight.dtype for weight in model.query_head.parameters()} == {torch.float32}
    cosines = (model.embed_query(CONVERSATIONS) * trained.embed_query(CONVERSATIONS)).sum(-1)
    assert cosines.min() > 0.999
    assert not heard()


def test_without_the_backbones_weights(trained, tmp_path, backbone_dir):
    trained.config.store_backbone, trained.config.backbone_name_or_path = False, str(backbone_dir)
    trained.save_pretrained(tmp_path / "head")
    assert not (tmp_path / "head" / "backbone").exists()
    assert json.loads((tmp_path / "head" / "config.json").read_text())["backbone_name_or_path"] == backbone_dir.name
    for backbone in (str(backbone_dir), trained.backbone):
        model = load(tmp_path / "head", backbone=backbone)
        assert_close(model.embed_query(CONVERSATIONS), trained.embed_query(CONVERSATIONS))
    with pytest.raises(OSError, match="backbone='path'") as error:
        load(tmp_path / "head")
    assert_one_line(error)


def test_the_head_alone_takes_hidden_states(trained, saved):
    head, cache = load(saved, backbone=False), trained.embed_query(CONVERSATIONS, return_cache=True).past_key_values
    vectors = head(cache.input_ids, cache.attention_mask, hidden_states=cache.hidden_states).query_embeddings
    assert_close(vectors.float(), trained.embed_query(CONVERSATIONS, batch_size=5))
    with pytest.raises(ValueError, match="without its backbone") as error:
        head.embed_query("Who?")
    assert_one_line(error)


def test_nothing_is_said_of_a_model_as_it_was_saved(saved, heard):
    load(saved)
    assert not heard()


@pytest.mark.parametrize("part", ["head", "backbone", "template"])
def test_a_change_is_told_at_load(part, saved, heard):
    from safetensors.torch import load_file, save_file

    if part == "template":
        template = saved / "chat_template.jinja"
        template.write_text(template.read_text().replace("<|im_start|>", "<|endoftext|>"))
    else:
        path = (saved if part == "head" else saved / "backbone") / "model.safetensors"
        weights = load_file(path)
        name = next(n for n in weights if n.endswith(("codes.weight", "embed_tokens.weight")))
        weights[name] = torch.randn_like(weights[name])
        save_file(weights, path, metadata={"format": "pt"})
    load(saved)
    assert heard()


def test_pickles_and_copies_are_the_same_model(trained, saved):
    model = load(saved)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert_close(twin.embed_query(CONVERSATIONS), trained.embed_query(CONVERSATIONS))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(OSError, match="no config.json") as error:
        NativeRetrievalModel.from_pretrained(str(tmp_path))
    assert_one_line(error)


@pytest.mark.parametrize("name", ["/home/al ice/m", "../x/b", "~/m", "C:\\x y\\m", "./m/", "a/b/c"])
def test_a_local_path_is_cut_to_its_name(name):
    published = NativeRetrievalConfig(
        backbone_name_or_path=name, teacher_name_or_path=name, head_num_layers=1
    ).to_json_string()
    assert name not in json.loads(published).values()
    assert not any(part in published for part in ("al ice", "x y", "~", ".."))


def test_a_hub_id_is_published_and_survives():
    config = NativeRetrievalConfig(teacher_name_or_path="sentence-transformers/all-MiniLM-L6-v2", word_vocab_size=9)
    again = NativeRetrievalConfig(**json.loads(config.to_json_string()))
    assert again.teacher_name_or_path == config.teacher_name_or_path
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_mode": "psychic"}, "query_mode='psychic'"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"head_dim": 30, "head_num_attention_heads": 4}, "a multiple of"),
        ({"word_vocab_size": 0}, "word_vocab_size=0"),
        ({"word_vocab_size": None}, "leave the head nothing to read"),
        ({"encoder_dim": 48}, "encoder_dim=48 must be a multiple of 32"),
        ({"encoder_num_layers": -1}, "encoder_num_layers=-1"),
        ({"encoder_code_dim": 0}, "encoder_code_dim=0"),
        ({"head_dropout": 1.0}, "head_dropout=1.0"),
        ({"hidden_state_layers": []}, "is empty"),
        ({"hidden_state_layers": [99]}, r"\[99\]"),
        ({"hidden_state_layers": [3], "selection_heads": [[4, 0]]}, r"selection_heads \[\[4, 0\]\]"),
        ({"store_backbone": False}, "needs backbone_name_or_path"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        NativeRetrievalConfig(**fields)
    assert_one_line(error)
