import gc
import json
import os
import resource
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_native_retrieval import NativeRetrievalModel
from native_retrieval.features import FeatureStore, cached_queries, shared_prefixes

# Of 4 tokens each, which with the fixture `small_shards` go by ten.
SHORT_SEQUENCES = [[10 + i, 11, 12, 13 + i % 5] for i in range(120)]
# Few different tokens, so that prefixes and duplicates are common.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=12)


@settings(max_examples=300, deadline=None)
@given(SEQUENCES)
def test_shared_prefixes(sequences: list[list[int]]):
    whole, host = shared_prefixes(sequences)
    assert len(host) == len(sequences)
    for sequence, place in zip(sequences, host, strict=True):
        assert sequences[whole[place]][: len(sequence)] == sequence
    # As few as can be: none of them begins another.
    for a in whole:
        for b in whole:
            assert a == b or sequences[b][: len(sequences[a])] != sequences[a]


def test_shared_prefixes_by_hand():
    sequences = [[1, 2], [1, 2, 3], [4], [1, 2, 3], [1, 3], [1]]
    whole, host = shared_prefixes(sequences)
    assert sorted(sequences[i] for i in whole) == [[1, 2, 3], [1, 3], [4]]
    assert [sequences[whole[place]] for place in host[:5]] == [[1, 2, 3], [1, 2, 3], [4], [1, 2, 3], [1, 3]]


def test_token_ids_are_compared_as_numbers():
    # As text, 1 begins 10.
    assert len(shared_prefixes([[1], [10], [10, 1]])[0]) == 2


@pytest.fixture
def sequences(tiny_model: NativeRetrievalModel) -> list[list[int]]:
    """The turns of three conversations, each a prefix of the next, and a few questions."""
    found = []
    for place in ("library", "castle", "museum"):
        messages = []
        for turn in range(3):
            messages.append({"role": "user", "content": f"Tell me more of the {place}, part {turn}."})
            found.append(tiny_model.processor.encode(messages))
            messages.append({"role": "assistant", "content": f"Part {turn} was built in 18{turn}4."})
    return [*found, *(tiny_model.processor.encode([{"role": "user", "content": f"{i}?"}]) for i in range(4)), found[0]]


def assert_states(store: FeatureStore, model: NativeRetrievalModel, sequences: list[list[int]]) -> None:
    assert len(store) == len(sequences)
    for i, sequence in enumerate(sequences):
        wanted = model.prefill(torch.tensor([sequence]), use_cache=False).hidden_states[0]
        assert store[i].dtype == torch.bfloat16
        torch.testing.assert_close(store[i].float(), wanted.float(), rtol=0.01, atol=1e-3)  # bfloat16: 8 bits


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("native_retrieval.features.SHARD_TOKENS", 40)


class Counted:
    """Counts the tokens that go through `model.prefill`, and breaks off when told to."""

    def __init__(self, model: NativeRetrievalModel, monkeypatch: pytest.MonkeyPatch, break_at: int | None = None):
        self.calls = self.tokens = 0
        self.prefill, self.break_at = model.prefill, break_at
        monkeypatch.setattr(model, "prefill", self)

    def __call__(self, input_ids, attention_mask=None, *args, **kwargs):
        if self.calls == self.break_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.tokens += int(attention_mask.sum())
        return self.prefill(input_ids, attention_mask, *args, **kwargs)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("tokens_per_batch", [1, 128, 4096])
def test_states_are_those_of_one_sequence_at_a_time(
    make_model: Callable[..., NativeRetrievalModel],
    sequences: list[list[int]],
    tmp_path: Path,
    family: str,
    tokens_per_batch: int,
):
    model = make_model(family)
    assert_states(FeatureStore.build(model, sequences, tmp_path, tokens_per_batch=tokens_per_batch), model, sequences)


def test_states_of_a_half_precision_backbone(make_backbone, make_model, sequences: list[list[int]], tmp_path: Path):
    model = make_model(backbone=make_backbone("llama", dtype=torch.bfloat16))
    store = FeatureStore.build(model, sequences, tmp_path, tokens_per_batch=1)
    for i, sequence in enumerate(sequences[:9]):
        wanted = model.prefill(torch.tensor([sequence]), use_cache=False).hidden_states[0]
        # A row on its own and a row in a longer one may round differently, and that adds up over the layers.
        assert torch.nn.functional.cosine_similarity(store[i].float(), wanted.float(), dim=-1).min() > 0.995


def test_vectors_from_stored_states(tiny_model: NativeRetrievalModel, sequences: list[list[int]], tmp_path: Path):
    store = FeatureStore.build(tiny_model, sequences, tmp_path)
    for i, sequence in enumerate(sequences):
        ids = torch.tensor([sequence])
        seen = tiny_model(ids, hidden_states=store[i][None]).query_embeddings
        assert torch.nn.functional.cosine_similarity(seen, tiny_model(ids).query_embeddings).item() > 0.999


def test_each_conversation_is_computed_once(
    tiny_model: NativeRetrievalModel, sequences: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    counted = Counted(tiny_model, monkeypatch)
    FeatureStore.build(tiny_model, sequences, tmp_path)
    longest = [sequences[2], sequences[5], sequences[8], *sequences[9:13]]
    assert counted.tokens == sum(map(len, longest))


def test_states_on_disk_are_read_and_not_computed(
    make_model: Callable[..., NativeRetrievalModel],
    sequences: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    first = FeatureStore.build(make_model(), sequences, tmp_path)
    again = make_model()  # the head is no part of it
    with torch.no_grad():
        for parameter in again.query_head.parameters():
            parameter.add_(1.0)
    monkeypatch.setattr(again, "prefill", None)
    second = FeatureStore.build(again, sequences, tmp_path)
    assert all(torch.equal(first[i], second[i]) for i in range(len(sequences)))


def test_a_stored_tensor_may_be_written_to(
    tiny_model: NativeRetrievalModel, sequences: list[list[int]], tmp_path: Path
):
    store = FeatureStore.build(tiny_model, sequences, tmp_path)
    before = store[0].clone()
    store[0].zero_()
    assert torch.equal(store[0], before)


@pytest.mark.parametrize("break_at", [0, 1, 75, 119])
def test_a_build_that_was_broken_off_goes_on(
    make_model: Callable[..., NativeRetrievalModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_shards: None,
    break_at: int,
):
    sequences = SHORT_SEQUENCES
    whole = FeatureStore.build(make_model(), sequences, tmp_path / "whole", tokens_per_batch=4)
    model = make_model()
    with monkeypatch.context() as patch:
        Counted(model, patch, break_at)
        with pytest.raises(KeyboardInterrupt):
            FeatureStore.build(model, sequences, tmp_path / "broken", tokens_per_batch=4)
    counted = Counted(model, monkeypatch)
    store = FeatureStore.build(model, sequences, tmp_path / "broken", tokens_per_batch=4)
    assert all(torch.equal(store[i], whole[i]) for i in range(len(sequences)))
    assert counted.calls == 120 - break_at // 10 * 10
    # Nothing half-done is left beside the whole file.
    assert len(list((tmp_path / "broken").glob("*.npy"))) == 1
    assert not [path.name for path in (tmp_path / "broken").iterdir() if "partial" in path.name]


def test_other_backbones_layers_and_sequences_have_files_of_their_own(
    make_model: Callable[..., NativeRetrievalModel],
    make_backbone: Callable,
    sequences: list[list[int]],
    tmp_path: Path,
):
    models = [
        make_model(),
        make_model(backbone=make_backbone("llama", seed=1)),
        make_model(hidden_state_layers=[1, 2, 3]),
        make_model("qwen3"),
    ]
    for model in models:
        assert_states(FeatureStore.build(model, sequences, tmp_path), model, sequences)
    assert_states(FeatureStore.build(models[0], sequences[:3], tmp_path), models[0], sequences[:3])
    assert len(list(tmp_path.glob("*.npy"))) == 5


def test_backbones_that_differ_in_a_few_numbers_do_not_share_states(
    make_model: Callable[..., NativeRetrievalModel], sequences: list[list[int]], tmp_path: Path
):
    def retune(model: NativeRetrievalModel, name: str) -> None:
        with torch.no_grad():
            weight = dict(model.backbone.named_parameters())[name]
            weight.view(-1)[weight.numel() // 2 + 1] += 3.0

    original = make_model()
    FeatureStore.build(original, sequences, tmp_path)
    names = [name for name, _ in original.backbone.named_parameters()]
    for name in (names[0], names[len(names) // 2]):
        tuned = make_model()
        retune(tuned, name)
        FeatureStore.build(tuned, sequences, tmp_path)
    with torch.no_grad():  # new embeddings of a few tokens, in a model whose states are cached already
        original.backbone.get_input_embeddings().weight[sequences[0][-3:]] += 1.0
    assert_states(FeatureStore.build(original, sequences, tmp_path), original, sequences)
    assert len(list(tmp_path.glob("*.npy"))) == 4
    cached_queries(original, sequences, tmp_path)
    retune(original, names[0])
    cached_queries(original, sequences, tmp_path)
    assert len(list(tmp_path.glob("queries-*.json"))) == 2


def test_backbones_with_the_same_weights_and_other_settings_do_not_share_states(
    make_model: Callable[..., NativeRetrievalModel],
    make_backbone: Callable,
    sequences: list[list[int]],
    tmp_path: Path,
):
    for epsilon in (1e-6, 1e-2):
        model = make_model(backbone=make_backbone("llama", rms_norm_eps=epsilon))
        assert_states(FeatureStore.build(model, sequences, tmp_path), model, sequences)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_the_weights_are_read_once_per_model(
    tiny_model: NativeRetrievalModel, sequences: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    FeatureStore.build(tiny_model, sequences, tmp_path)
    monkeypatch.setattr(torch.Tensor, "cpu", None)  # to hash a weight, it must come to the CPU
    FeatureStore.build(tiny_model, sequences, tmp_path)


def test_a_cached_digest_keeps_no_model_alive(make_model: Callable[..., NativeRetrievalModel], tmp_path: Path):
    model = make_model()
    FeatureStore.build(model, [[1, 2, 3]], tmp_path)
    backbone = weakref.ref(model.backbone)
    del model
    gc.collect()
    assert backbone() is None


@pytest.mark.parametrize("kept", [0, 40, 500])
def test_a_truncated_file_is_computed_anew(
    tiny_model: NativeRetrievalModel, sequences: list[list[int]], tmp_path: Path, kept: int
):
    FeatureStore.build(tiny_model, sequences, tmp_path)
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:kept])
    assert_states(FeatureStore.build(tiny_model, sequences, tmp_path), tiny_model, sequences)


def test_a_full_disk_is_named_before_anything_is_written(
    tiny_model: NativeRetrievalModel, sequences: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(total=100, used=90, free=10))
    with pytest.raises(OSError, match="GB free") as error:
        FeatureStore.build(tiny_model, sequences, tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not list(tmp_path.glob("*.npy"))


# -- faults -----------------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_told_and_computed_anew(
    tiny_model: NativeRetrievalModel, sequences: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture
):
    FeatureStore.build(tiny_model, sequences, tmp_path)
    (path,) = tmp_path.glob("*.npy")
    whole = path.read_bytes()
    capsys.readouterr()
    flip_a_byte(path)
    assert_states(FeatureStore.build(tiny_model, sequences, tmp_path), tiny_model, sequences)
    assert path.read_bytes() == whole
    assert [line for line in capsys.readouterr().err.splitlines() if str(path) in line and "computed again" in line]


def test_a_flipped_byte_in_the_written_queries_is_told_and_computed_anew(
    tiny_model: NativeRetrievalModel, sequences: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture
):
    wanted = cached_queries(tiny_model, sequences, tmp_path)
    (path,) = tmp_path.glob("queries-*.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "0": [1, 2, 3]}))  # JSON still, and the wrong query
    assert cached_queries(tiny_model, sequences, tmp_path) == wanted
    assert f"{path} is not as it was written" in capsys.readouterr().err


def test_what_is_finished_is_read_without_writing(
    tiny_model: NativeRetrievalModel, sequences: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    FeatureStore.build(tiny_model, sequences, tmp_path)
    queries = cached_queries(tiny_model, sequences, tmp_path)
    monkeypatch.setattr("native_retrieval.cache.FileLock", None)  # the first thing that would be written
    before = tmp_path.stat().st_mtime_ns
    assert_states(FeatureStore.build(tiny_model, sequences, tmp_path), tiny_model, sequences)
    assert cached_queries(tiny_model, sequences, tmp_path) == queries
    assert tmp_path.stat().st_mtime_ns == before


@pytest.mark.parametrize("what", [FeatureStore.build, cached_queries])
def test_a_cache_that_cannot_be_written_to_is_named(
    tiny_model: NativeRetrievalModel, sequences: list[list[int]], tmp_path: Path, what: Callable
):
    cache = tmp_path / "cache"
    if os.geteuid():
        cache.mkdir(mode=0o555)
    else:  # who may write everywhere, but not into a file's folder
        cache.write_text("")
    with pytest.raises(OSError, match="cannot be written to.*set another cache_dir") as error:
        what(tiny_model, sequences, cache)
    assert "\n" not in str(error.value) and str(cache) in str(error.value)


def test_a_disk_that_fills_up_is_named_and_what_was_done_is_gone_on_with(
    tiny_model: NativeRetrievalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
):
    sequences = SHORT_SEQUENCES
    whole = FeatureStore.build(tiny_model, sequences, tmp_path / "whole", tokens_per_batch=4)
    prefill, passed = tiny_model.prefill, 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk(*args, **kwargs):
        nonlocal passed
        passed += 1
        if passed == 60:  # what is written beyond fails, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        return prefill(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_model, "prefill", fill_the_disk)
        try:
            with pytest.raises(OSError, match="cannot be written to.*free some space") as error:
                FeatureStore.build(tiny_model, sequences, tmp_path / "full", tokens_per_batch=4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    counted = Counted(tiny_model, monkeypatch)
    store = FeatureStore.build(tiny_model, sequences, tmp_path / "full", tokens_per_batch=4)
    assert all(torch.equal(store[i], whole[i]) for i in range(len(sequences)))
    assert counted.calls == 70


def test_what_was_half_done_is_gone_on_with_in_batches_of_another_size(
    tiny_model: NativeRetrievalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
):
    with monkeypatch.context() as patch:
        Counted(tiny_model, patch, 75)
        with pytest.raises(KeyboardInterrupt):
            FeatureStore.build(tiny_model, SHORT_SEQUENCES, tmp_path, tokens_per_batch=4)
    with monkeypatch.context() as patch:
        counted = Counted(tiny_model, patch)
        store = FeatureStore.build(tiny_model, SHORT_SEQUENCES, tmp_path, tokens_per_batch=40)
    assert (counted.calls, counted.tokens) == (5, 200)
    assert_states(store, tiny_model, SHORT_SEQUENCES)


def test_what_was_done_of_an_earlier_file_is_not_believed_of_a_new_one(
    tiny_model: NativeRetrievalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
):
    # Killed after the file had its name, and before the notes beside it went; then the file was damaged.
    with monkeypatch.context() as patch:
        Counted(tiny_model, patch, 110)
        with pytest.raises(KeyboardInterrupt):
            FeatureStore.build(tiny_model, SHORT_SEQUENCES, tmp_path, tokens_per_batch=4)
    notes = {path: path.read_bytes() for path in tmp_path.glob("*.shard*")}
    FeatureStore.build(tiny_model, SHORT_SEQUENCES, tmp_path, tokens_per_batch=4)
    (path,) = tmp_path.glob("*.npy")
    whole = path.read_bytes()
    flip_a_byte(path)
    assert len(notes) == 22  # each with its checksum
    for note, content in notes.items():
        note.write_bytes(content)
    FeatureStore.build(tiny_model, SHORT_SEQUENCES, tmp_path, tokens_per_batch=4)
    assert path.read_bytes() == whole
