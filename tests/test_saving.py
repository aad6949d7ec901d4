"""Save and load, here and in a fresh process; the configuration; tokenizers that come with a model."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONVERSATIONS, FAMILIES, MODES, StubTeacher, assert_close, assert_one_line, prompts_of, take_steps
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import modeling_native_retrieval
from configuration_native_retrieval import NativeRetrievalConfig
from modeling_native_retrieval import NativeRetrievalModel

# Save and load


FRESH_PROCESS = """
import importlib.util, json, os, sys

NAMES = {"native_retrieval", "modeling_native_retrieval", "configuration_native_retrieval"}

class NotInstalled:  # the project may be installed where the tests run
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled)
for name in NAMES:
    try:
        importlib.util.find_spec(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer

folders, conversations = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for folder in folders:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert not NAMES & set(sys.modules)
    assert not model.training
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).teacher_name_or_path == "stub-teacher"
    assert len(AutoTokenizer.from_pretrained(folder)) == len(model.tokenizer)
    vectors = [model.embed_query(conversations, mode=mode).numpy() for mode in ("context", "generated", "probe")]
    np.save(os.path.join(folder, "vectors.npy"), np.stack(vectors))
    ids = torch.tensor([model.build_prompt(conversations[1])])
    np.save(os.path.join(folder, "tokens.npy"), model.generate(ids, max_new_tokens=12, do_sample=False).numpy())
"""


def test_a_fresh_process_without_the_project_gives_bit_equal_vectors(
    make_model: Callable[..., NativeRetrievalModel], make_backbone: Callable[..., PreTrainedModel], tmp_path: Path
):
    models = {f"saved-{family}": make_model(family, teacher_name_or_path="stub-teacher") for family in FAMILIES}
    half = make_backbone("llama", dtype=torch.bfloat16)
    models["saved-bf16"] = make_model(backbone=half, teacher_name_or_path="stub-teacher")
    for name, model in models.items():
        take_steps(model, steps=1)
        model.save_pretrained(tmp_path / name)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "COV"))}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    folders = json.dumps([str(tmp_path / name) for name in models])
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, folders, json.dumps(CONVERSATIONS)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in models:
        model = NativeRetrievalModel.from_pretrained(tmp_path / name)
        wanted = torch.stack([model.embed_query(CONVERSATIONS, mode=mode) for mode in MODES])
        assert np.array_equal(np.load(tmp_path / name / "vectors.npy"), wanted.numpy()), name
        ids = torch.tensor([model.build_prompt(CONVERSATIONS[1])])
        tokens = model.generate(ids, max_new_tokens=12, do_sample=False)
        assert np.array_equal(np.load(tmp_path / name / "tokens.npy"), tokens.numpy()), name


def test_saving_ships_the_code_and_the_tokenizer(tiny_model: NativeRetrievalModel, tmp_path: Path):
    tiny_model.save_pretrained(tmp_path)
    for name in ("configuration_native_retrieval.py", "modeling_native_retrieval.py"):
        original = Path(sys.modules[name.removesuffix(".py")].__file__)
        assert (tmp_path / name).read_text() == original.read_text()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_native_retrieval.NativeRetrievalConfig",
        "AutoModel": "modeling_native_retrieval.NativeRetrievalModel",
        "AutoModelForCausalLM": "modeling_native_retrieval.NativeRetrievalForCausalLM",
    }
    loaded = AutoTokenizer.from_pretrained(tmp_path, config=tiny_model.config.text_config)
    assert loaded.get_vocab() == tiny_model.tokenizer.get_vocab()
    assert loaded.chat_template == tiny_model.tokenizer.chat_template
    assert prompts_of(NativeRetrievalModel.from_pretrained(tmp_path)) == prompts_of(tiny_model)


def test_saving_and_loading_twice_changes_nothing(make_model: Callable[..., NativeRetrievalModel], tmp_path: Path):
    model = make_model("gemma3", query_mode="generated", num_context_tokens=5, hidden_state_layers=[1, 4], copy_layer=1)
    model.save_pretrained(tmp_path / "one")
    once = NativeRetrievalModel.from_pretrained(tmp_path / "one")
    once.save_pretrained(tmp_path / "two")
    twice = NativeRetrievalModel.from_pretrained(tmp_path / "two")
    assert twice.config.to_dict() | {"_name_or_path": ""} == once.config.to_dict() | {"_name_or_path": ""}
    for field in ("query_mode", "num_context_tokens", "hidden_state_layers", "copy_layer", "max_prompt_tokens"):
        assert getattr(twice.config, field) == getattr(model.config, field), field
    assert twice.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(twice.state_dict()[name], weight), name
    assert_close(twice.embed_query(CONVERSATIONS), model.embed_query(CONVERSATIONS))


@pytest.mark.parametrize(
    "arguments", [{"dtype": "auto"}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"dtype": torch.float32}]
)
def test_large_maps_have_the_backbones_precision_and_vectors_agree(
    arguments: dict[str, Any],
    make_backbone: Callable[..., PreTrainedModel],
    make_model: Callable[..., NativeRetrievalModel],
    tmp_path: Path,
):
    model = make_model(backbone=make_backbone("llama", dtype=torch.bfloat16))
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if not name.startswith("backbone."))
    take_steps(model, steps=1)
    model.save_pretrained(tmp_path)
    loaded = NativeRetrievalModel.from_pretrained(tmp_path, **arguments)
    wanted = torch.bfloat16 if arguments["dtype"] == "auto" else arguments["dtype"]
    summed = ("key", "antecedents.key", "antecedents.nothing", "segment_bias", "topic_", "token_", "gain", "novelty")
    summed = tuple(f"copy_path.{name}" for name in summed)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if name.startswith(summed) else wanted), name
    # In another precision a backbone may write another query.
    for mode in MODES if wanted == torch.bfloat16 else ("context", "probe"):
        vectors = loaded.embed_query(CONVERSATIONS, mode=mode)
        assert vectors.dtype == torch.float32
        cosines = (vectors * model.embed_query(CONVERSATIONS, mode=mode)).sum(1)
        assert (cosines > 0.999).all(), (mode, cosines)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_processor_without_bfloat16_computes_in_float32_and_saves_what_it_was_given(
    has_bfloat16: bool,
    make_backbone: Callable[..., PreTrainedModel],
    stub_teacher: StubTeacher,
    tiny_tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(modeling_native_retrieval, "processor_has_bfloat16", lambda: has_bfloat16)
    wanted = torch.bfloat16 if has_bfloat16 or torch.accelerator.is_available() else torch.float32
    backbone = make_backbone("llama", dtype=torch.bfloat16)
    backbone.save_pretrained(tmp_path / "backbone")
    tiny_tokenizer.save_pretrained(tmp_path / "backbone")
    model = NativeRetrievalModel.from_backbone(str(tmp_path / "backbone"), stub_teacher)
    written = []
    # Saved from what was made, from what was loaded, and as the Trainer hands it over, when weights are spread.
    for folder, arguments in (("made", {}), ("loaded", {}), ("given", {"state_dict": model.state_dict()})):
        assert model.backbone.dtype == wanted
        before = model.embed_query(CONVERSATIONS)
        model.save_pretrained(tmp_path / folder, **arguments)
        assert model.backbone.dtype == wanted and torch.equal(model.embed_query(CONVERSATIONS), before)
        saved = load_file(tmp_path / folder / "model.safetensors")
        for name, weight in backbone.state_dict().items():
            if f"backbone.{name}" in saved:  # of tied weights, one
                kept = saved[f"backbone.{name}"]
                assert kept.dtype == weight.dtype and torch.equal(kept, weight), name
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == "bfloat16"
        written.append(set(saved))
        model = NativeRetrievalModel.from_pretrained(tmp_path / folder)
        assert model.backbone.dtype == model.head.linear_in.weight.dtype == wanted
        assert ((model.embed_query(CONVERSATIONS) * before).sum(1) > 0.999).all()
    assert written[0] == written[1] == written[2]
    model.config.store_backbone = False
    model.save_pretrained(tmp_path / "head")
    assert json.loads((tmp_path / "head" / "config.json").read_text())["dtype"] == "bfloat16"
    alone = NativeRetrievalModel.from_pretrained(tmp_path / "head", attn_implementation="eager")
    assert alone.backbone.dtype == wanted and alone.backbone.config._attn_implementation == "eager"


def test_what_is_pushed_while_saving_is_the_whole_repository(
    make_taught_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, _ = make_taught_model()
    pushed = {}

    def push(self, repo_id, **kwargs):
        pushed[repo_id] = {str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*.json")}

    monkeypatch.setattr(NativeRetrievalModel, "push_to_hub", push)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/mine")
    wanted = {"config.json", "tokenizer.json", "generation_config.json", "teacher_tokenizer/tokenizer.json"}
    assert wanted <= pushed["me/mine"]


def test_a_model_that_was_just_loaded_takes_token_ids(tiny_model: NativeRetrievalModel, tmp_path: Path):
    tiny_model.save_pretrained(tmp_path)
    ids = torch.tensor([tiny_model.build_prompt(CONVERSATIONS[1])])
    loaded = NativeRetrievalModel.from_pretrained(tmp_path)
    assert_close(loaded(ids).query_embeddings.detach(), tiny_model(ids).query_embeddings.detach())
    loaded = NativeRetrievalModel.from_pretrained(tmp_path)
    assert loaded.generate(inputs=ids, max_new_tokens=1).shape == (1, ids.shape[1] + 1)


def test_models_around_one_backbone_read_their_own_layers(
    make_model: Callable[..., NativeRetrievalModel], make_backbone: Callable[..., PreTrainedModel]
):
    backbone = make_backbone("llama")
    for layers in ([1, 2], [2, 3, 4]):
        model = make_model(backbone=backbone, hidden_state_layers=layers)
        found = model.embed_query(CONVERSATIONS[1], mode="context", return_cache=True)
        assert_close(found.query_embeddings, model.embed_query(CONVERSATIONS[1], mode="context"))


def test_what_generation_pads_a_row_with_is_not_read(make_model: Callable[..., NativeRetrievalModel]):
    model = make_model()
    found = model.embed_query(CONVERSATIONS[:2], mode="context", return_cache=True)
    end, pad = model.tokenizer.eos_token_id, model.tokenizer.pad_token_id
    said = torch.tensor([[9, end, pad, pad, pad, pad], [9, 11, 12, 13, 14, 15]])  # the first row ended early
    ids = torch.cat((found.input_ids, said), dim=1)
    vectors = model.embed_query(ids, mode="context", past_key_values=found.past_key_values)
    prompts = [row[mask.bool()].tolist() for row, mask in zip(found.input_ids, found.attention_mask, strict=True)]
    alone = [model.embed_query(torch.tensor([prompts[0] + said[0, :2].tolist()]), mode="context")]
    alone.append(model.embed_query(torch.tensor([prompts[1] + said[1].tolist()]), mode="context"))
    assert_close(vectors, torch.cat(alone))


def test_the_head_alone_takes_hidden_states(make_model: Callable[..., NativeRetrievalModel], tmp_path: Path):
    from native_retrieval.loading import load_head

    model = make_model()
    take_steps(model, steps=1)
    model.save_pretrained(tmp_path)
    head = load_head(tmp_path)
    assert all(p.is_meta for p in head.backbone.parameters()), "the backbone's weights were read"
    for prompt in prompts_of(model):
        ids = torch.tensor([prompt])
        states = model.prefill(ids).hidden_states
        assert torch.allclose(head(ids, hidden_states=states).query_embeddings, model(ids).query_embeddings, atol=1e-6)


def keys_of(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_without_the_backbones_weights(backbone_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    backbone = tmp_path / "backbone"
    AutoModelForCausalLM.from_pretrained(backbone_dir).save_pretrained(backbone)
    tiny_tokenizer.save_pretrained(backbone)
    fields = {"embedding_dim": 32, "head_dim": 32, "head_num_attention_heads": 4, "copy_num_heads": 2}
    fields |= {"num_probe_tokens": 3, "adapter_rank": 2}
    whole = NativeRetrievalModel.from_backbone(str(backbone), **fields)
    take_steps(whole, steps=1)
    for weight in whole.probe.parameters():
        weight.data.add_(0.1)
    whole.save_pretrained(tmp_path / "whole")
    assert whole.config.backbone_name_or_path == str(backbone)

    whole.config.store_backbone = False
    whole.save_pretrained(tmp_path / "head")
    assert any(key.startswith("backbone.") for key in keys_of(tmp_path / "whole"))
    keys = keys_of(tmp_path / "head")
    assert keys and not any(key.startswith("backbone.") for key in keys)
    assert {key for key in keys_of(tmp_path / "whole") if not key.startswith("backbone.")} == set(keys)

    loaded = NativeRetrievalModel.from_pretrained(tmp_path / "head")
    assert not loaded.backbone.training and not any(p.requires_grad for p in loaded.backbone.parameters())
    for mode in MODES:
        assert_close(
            loaded.embed_query(CONVERSATIONS, mode=mode).to(torch.float32),
            NativeRetrievalModel.from_pretrained(tmp_path / "whole").embed_query(CONVERSATIONS, mode=mode),
        )
    loaded.save_pretrained(tmp_path / "again")
    assert keys_of(tmp_path / "again") == keys

    backbone.rename(tmp_path / "gone")
    with pytest.raises(OSError, match="could not be fetched") as error:
        NativeRetrievalModel.from_pretrained(tmp_path / "head")
    assert_one_line(error)
    assert str(backbone) in str(error.value)


def test_loading_reports_no_missing_weights(tiny_model: NativeRetrievalModel, tmp_path: Path):
    tiny_model.save_pretrained(tmp_path)
    _, report = NativeRetrievalModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_a_model_without_a_tokenizer_says_so(make_backbone: Callable[..., PreTrainedModel]):
    config = NativeRetrievalConfig(
        text_config=make_backbone("llama").config, embedding_dim=8, head_dim=8, head_num_attention_heads=2
    )
    with pytest.raises(ValueError, match="tokenizer") as error:
        NativeRetrievalModel(config).embed_query("Who?")
    assert_one_line(error)


def test_another_tokenizer_template_or_library_is_warned_of_once(tiny_model: NativeRetrievalModel, tmp_path: Path):
    folders = {change: tmp_path / change for change in ("template", "vocabulary", "library", "nothing")}
    for folder in folders.values():
        tiny_model.save_pretrained(folder)
    template = folders["template"] / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|> "))
    tokenizer = AutoTokenizer.from_pretrained(folders["vocabulary"])
    tokenizer.add_tokens(["1974"])
    tokenizer.save_pretrained(folders["vocabulary"])
    config = folders["library"] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "transformers_version": "4.40.0"}))
    script = (
        "import sys; from transformers import AutoModel; from transformers.utils import logging\n"
        "for folder in sys.argv[1:]:\n"
        "    print('== next', file=sys.stderr)\n"
        "    logging.warning_once.cache_clear()\n"
        "    for _ in range(2):\n"
        "        AutoModel.from_pretrained(folder, trust_remote_code=True).embed_query('Who?')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders.values())],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = {
        change: [line for line in part.splitlines() if "was trained with" in line or "was saved with" in line]
        for change, part in zip(folders, done.stderr.split("== next")[1:], strict=True)
    }
    assert {change: len(lines) for change, lines in said.items()} == {
        "template": 1,
        "vocabulary": 1,
        "library": 1,
        "nothing": 0,
    }, done.stderr[-2000:]


def test_auto_classes_know_the_saved_model(tiny_model: NativeRetrievalModel, tmp_path: Path):
    tiny_model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).model_type == "native_retrieval"
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert_close(loaded.embed_query(CONVERSATIONS), tiny_model.embed_query(CONVERSATIONS))


def test_how_the_backbone_stops_and_samples_is_saved(tiny_model: NativeRetrievalModel, tmp_path: Path):
    settings = tiny_model.backbone.generation_config
    settings.eos_token_id, settings.do_sample, settings.top_k = [2, 7, 9], True, 3
    tiny_model.save_pretrained(tmp_path)
    loaded = NativeRetrievalModel.from_pretrained(tmp_path).backbone.generation_config
    assert (loaded.eos_token_id, loaded.do_sample, loaded.top_k) == ([2, 7, 9], True, 3)


def test_threads_that_meet_a_fresh_model_wait_for_its_tokenizer(
    tiny_model: NativeRetrievalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny_model.save_pretrained(tmp_path)
    wanted = tiny_model.embed_query("Who built it?")
    loaded = NativeRetrievalModel.from_pretrained(tmp_path)
    fingerprint, reading = modeling_native_retrieval._tokenizer_fingerprint, threading.Event()

    def slow(tokenizer) -> str:
        reading.set()
        time.sleep(0.2)
        return fingerprint(tokenizer)

    monkeypatch.setattr(modeling_native_retrieval, "_tokenizer_fingerprint", slow)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(loaded.embed_query, "Who built it?")
        assert reading.wait(10)
        assert_close(loaded.embed_query("Who built it?"), wanted)
        assert_close(other.result(), wanted)


# Config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_mode": "psychic"}, "query_mode='psychic'"),
        ({"query_mode": "probe"}, "query_mode='probe' needs probe tokens"),
        ({"adapter_rank": 0}, "adapter_rank=0"),
        ({"embedding_dim": 0}, "embedding_dim=0"),
        ({"num_context_tokens": 0}, "num_context_tokens=0"),
        ({"max_query_tokens": 0}, "max_query_tokens=0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"head_num_attention_heads": 0}, "head_num_attention_heads=0"),
        ({"head_num_layers": -1}, "head_num_layers=-1"),
        ({"head_dim": 30, "head_num_attention_heads": 4}, "head_dim=30"),
        ({"head_dropout": 1.0}, "head_dropout=1.0"),
        ({"head_dropout": -0.1}, "head_dropout=-0.1"),
        ({"copy_num_heads": -1}, "copy_num_heads=-1"),
        ({"copy_head_dim": 0}, "copy_head_dim=0"),
        ({"hidden_state_layers": []}, "hidden_state_layers"),
        ({"hidden_state_layers": [1, 5]}, r"\[5\]"),
        ({"hidden_state_layers": [-1]}, r"\[-1\]"),
        ({"hidden_state_layers": [1, 2], "copy_layer": 3}, "copy_layer=3"),
        ({"store_backbone": False}, "backbone_name_or_path"),
    ],
)
def test_bad_configs(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        NativeRetrievalConfig(text_config=LlamaConfig(num_hidden_layers=4), **fields)
    assert_one_line(error)


def test_a_config_survives_json(tmp_path: Path):
    config = NativeRetrievalConfig(
        text_config=LlamaConfig(num_hidden_layers=4, hidden_size=64), hidden_state_layers=[0, 4], copy_layer=0
    )
    config.save_pretrained(tmp_path)
    loaded = NativeRetrievalConfig.from_pretrained(tmp_path)
    assert loaded.text_config.hidden_size == 64 and loaded.text_config.model_type == "llama"
    assert (loaded.hidden_state_layers, loaded.copy_layer) == ([0, 4], 0)
    assert loaded.max_prompt_tokens == config.max_prompt_tokens
