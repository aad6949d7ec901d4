"""A model as its users hold it: in half precision, quantised, spread over devices, compiled, copied, in other processes."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import accelerate
import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import CONVERSATIONS, MODES, SENTENCES, assert_close, prompts_of, stir, user
from transformers import PreTrainedModel

from modeling_native_retrieval import NativeRetrievalModel

LONG = [user(" ".join(SENTENCES))]  # where rounded angles of positions are seen
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=["llama", "gpt2", "qwen3_5"], scope="module")
def saved(request: pytest.FixtureRequest, make_model, tmp_path_factory) -> tuple[NativeRetrievalModel, Path]:
    """(a model, where it is saved)."""
    model, folder = stir(make_model(request.param)), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def llama(make_model, tmp_path_factory) -> tuple[NativeRetrievalModel, Path]:
    model, folder = stir(make_model("llama", tie=False)), tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


def assert_same(seen: NativeRetrievalModel, wanted: NativeRetrievalModel) -> None:
    """The same vectors in both modes, and the same text, with a cache and without."""
    for mode in MODES:
        assert_close(seen.embed_query(CONVERSATIONS, mode=mode), wanted.embed_query(CONVERSATIONS, mode=mode))
    ids = torch.tensor(prompts_of(wanted, CONVERSATIONS[1:2]))
    text = wanted.generate(ids, **GREEDY)
    cache = seen.embed_query(CONVERSATIONS[1], return_cache=True).past_key_values
    assert torch.equal(seen.generate(ids, past_key_values=cache, **GREEDY), text)
    assert torch.equal(seen.generate(ids, **GREEDY), text)


def assert_near(vectors: torch.Tensor, wanted: torch.Tensor, least: float) -> None:
    cosines = F.cosine_similarity(vectors, wanted)
    assert (cosines > least).all(), cosines


# -- precision ---------------------------------------------------------------------------------------------------------

CASTS: dict[str, Callable] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to("cpu", torch.bfloat16),
    "half, then float": lambda model: model.half().float(),
    "the backbone alone": lambda model: model.backbone.half() and model,
    "the head alone": lambda model: model.query_head.bfloat16() and model,
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_change_the_vectors_as_little_as_their_precision(saved, name: str):
    model, _ = saved
    cast = CASTS[name](copy.deepcopy(model))
    for conversations in (CONVERSATIONS, LONG):
        vectors = cast.embed_query(conversations)
        assert vectors.dtype == torch.float32
        assert_near(vectors, model.embed_query(conversations), 0.999)
    found = cast.embed_query(CONVERSATIONS, mode="generated", return_cache=True, return_attributions=True)
    assert torch.isfinite(found.query_embeddings).all() and torch.isfinite(found.attributions).all()
    mask = found.attention_mask
    ids = cast.generate(found.input_ids, attention_mask=mask, past_key_values=found.past_key_values, **GREEDY)
    assert ids.shape[1] == mask.shape[1] + 6


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_a_precision_may_be_given_by_name(llama, dtype: str):
    model, folder = llama
    loaded = NativeRetrievalModel.from_pretrained(folder, dtype=dtype)
    assert loaded.backbone.dtype == {"auto": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    assert_near(loaded.embed_query(LONG), model.embed_query(LONG), 0.999)


def test_the_attention_asked_for_at_loading_is_the_backbones(llama):
    model, folder = llama
    loaded = NativeRetrievalModel.from_pretrained(folder, attn_implementation="eager")
    assert loaded.backbone.config._attn_implementation == "eager" != model.backbone.config._attn_implementation
    assert_same(loaded, model)


def test_a_backbone_in_bfloat16_stays_so(make_backbone: Callable[..., PreTrainedModel], make_model, tmp_path: Path):
    model = stir(make_model(backbone=make_backbone("llama", dtype=torch.bfloat16)))
    model.save_pretrained(tmp_path)
    loaded = NativeRetrievalModel.from_pretrained(tmp_path)
    assert {weight.dtype for weight in loaded.backbone.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.embed_query(CONVERSATIONS), model.embed_query(CONVERSATIONS))


def test_a_backbone_may_be_quantised(llama, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    model, folder = llama
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = NativeRetrievalModel.from_pretrained(folder, quantization_config=settings)
    assert_near(loaded.embed_query(CONVERSATIONS), model.embed_query(CONVERSATIONS), 0.95)
    assert {type(weight) for weight in loaded.query_head.parameters()} == {torch.nn.Parameter}
    assert "cosine" not in caplog.text
    loaded.save_pretrained(tmp_path)
    for again in (NativeRetrievalModel.from_pretrained(tmp_path), *(make(loaded) for make in COPIES.values())):
        assert_close(again.embed_query(CONVERSATIONS), loaded.embed_query(CONVERSATIONS))


# -- devices -----------------------------------------------------------------------------------------------------------

PLACEMENTS = {
    "auto": {"device_map": "auto"},
    "little memory": {"device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": "offload"},
    "some on disk": {"device_map": {}, "offload_folder": "offload"},
}


def half_on_disk(backbone: PreTrainedModel) -> dict[str, str]:
    base, prefix = backbone.base_model, backbone.base_model_prefix
    layers = "h" if hasattr(base, "h") else "layers"
    inner = {f"{prefix}.{name}": "cpu" for name, _ in base.named_children() if name != layers}
    return {**inner, "lm_head": "cpu", **{f"{prefix}.{layers}.{i}": "disk" if i % 2 else "cpu" for i in range(4)}}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_backbone_goes_where_the_device_map_says(saved, name: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, folder = saved
    arguments = {**PLACEMENTS[name]}
    arguments["device_map"] = arguments["device_map"] or half_on_disk(model.backbone)
    loaded = NativeRetrievalModel.from_pretrained(folder, **arguments)
    assert not any(weight.is_meta for weight in loaded.query_head.parameters())
    assert any(weight.is_meta for weight in loaded.backbone.parameters()) == ("offload_folder" in arguments)
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    again = NativeRetrievalModel.from_pretrained(tmp_path / "again")
    assert_close(again.embed_query(CONVERSATIONS), model.embed_query(CONVERSATIONS))


def test_accelerate_may_place_the_whole_model(llama):
    model, _ = llama
    placed = copy.deepcopy(model)
    device_map = accelerate.infer_auto_device_map(placed, max_memory={"cpu": 10**9})
    assert set(device_map.values()) == {"cpu"}
    placed = accelerate.dispatch_model(placed, device_map, force_hooks=True)
    assert_same(placed, model)
    assert_same(copy.deepcopy(placed), model)


# -- compiled, copied, in other processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["the whole", "query_head", "backbone.base_model"])
def test_compiling_changes_nothing(llama, part: str):
    model, _ = llama
    torch.compiler.reset()
    compiled = copy.deepcopy(model)
    if part == "the whole":
        called = torch.compile(compiled, backend="eager")
    else:
        called = compiled
        compiled.get_submodule(part).compile(backend="eager")
    prompts = model.processor.pad(prompts_of(model))
    with torch.no_grad():
        assert_near(called(*prompts).query_embeddings, model(*prompts).query_embeddings, 0.9999)
    assert_close(pickle.loads(pickle.dumps(compiled)).embed_query(CONVERSATIONS), model.embed_query(CONVERSATIONS))


COPIES: dict[str, Callable] = {
    "deepcopy": copy.deepcopy,
    "pickle, twice": lambda model: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(model)))),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize(("dtype", "used"), [(torch.float32, False), (torch.bfloat16, True)], ids=["new", "used"])
def test_a_copy_is_the_same_and_independent(saved, name: str, dtype: torch.dtype, used: bool):
    _, folder = saved
    model = NativeRetrievalModel.from_pretrained(folder, dtype=dtype)
    settings = model.backbone.generation_config
    settings.eos_token_id, settings.do_sample, settings.top_k = [2, 7, 9], True, 3
    if used:  # transformers prepares some of it in the first pass
        model.embed_query(CONVERSATIONS, mode="generated")
    twin = COPIES[name](model)
    assert torch.equal(twin.embed_query(LONG), model.embed_query(LONG))
    assert_same(twin, model)
    settings = twin.generation_config
    assert settings is twin.backbone.generation_config is not model.generation_config
    assert (settings.eos_token_id, settings.do_sample, settings.top_k) == ([2, 7, 9], True, 3)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert not any(weight.requires_grad for weight in twin.backbone.parameters())
    assert all(weight.requires_grad for weight in twin.query_head.parameters())
    assert not twin.training and twin.name_or_path == model.name_or_path
    before = model.embed_query(CONVERSATIONS)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.fill_(0.1)
    assert torch.equal(model.embed_query(CONVERSATIONS), before)
    twin = COPIES[name](model.train())
    assert twin.training and not twin.backbone.training


def test_a_head_alone_is_copied(llama):
    model, folder = llama
    head = NativeRetrievalModel.from_pretrained(folder, backbone=False)
    ids = torch.tensor(prompts_of(model, CONVERSATIONS[1:2]))
    states = model.prefill(ids).hidden_states
    for make in COPIES.values():
        assert torch.equal(make(head)(ids, hidden_states=states).query_embeddings, model(ids).query_embeddings)


def test_torch_saves_it_whole(llama, tmp_path: Path):
    torch.save(llama[0], tmp_path / "model.pt")
    assert_same(torch.load(tmp_path / "model.pt", weights_only=False), llama[0])


def embed(job: tuple[NativeRetrievalModel, list]) -> torch.Tensor:
    return job[0].embed_query(job[1])


def test_a_new_process_gives_the_same_vectors(llama):
    model, _ = llama
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        vectors = pool.map(embed, [(model, CONVERSATIONS[:2]), (model, CONVERSATIONS[2:])])
    assert_close(torch.cat(vectors), model.embed_query(CONVERSATIONS))


@pytest.fixture
def one_thread():
    """Those of a forked process would wait for their parent's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_datasets_maps_with_the_model_in_a_closure(llama, one_thread):
    model, _ = llama
    questions = [conversation[-1]["content"] for conversation in CONVERSATIONS]
    rows = datasets.Dataset.from_dict({"question": questions})
    rows = rows.map(lambda row: {"vector": model.embed_query(row["question"])[0].numpy()}, num_proc=2)
    assert_close(torch.tensor(rows["vector"]), model.embed_query(questions))
