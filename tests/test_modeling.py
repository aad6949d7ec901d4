"""NativeRetrievalModel: vectors, training, a start from a backbone, and what bad input says."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    CONTEXT,
    CONVERSATIONS,
    FAMILIES,
    MODES,
    StubTeacher,
    assert_close,
    assert_one_line,
    assistant,
    pad,
    prompts_of,
    stir,
    user,
)
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast

from head_native_retrieval import Words
from modeling_native_retrieval import NativeRetrievalModel
from native_retrieval.initialise import from_backbone

# Vectors


@pytest.mark.parametrize("mode", MODES)
def test_vectors_do_not_depend_on_batch_size_or_order(model: NativeRetrievalModel, mode: str):
    vectors = model.embed_query(CONVERSATIONS, mode=mode, batch_size=1)
    assert vectors.shape == (len(CONVERSATIONS), 32) and vectors.dtype == torch.float32 and not vectors.requires_grad
    assert_close(vectors.norm(dim=-1), torch.ones(len(CONVERSATIONS)))
    assert torch.cdist(vectors, vectors).triu(1).max() > 0.05  # and yet they are different vectors
    for batch_size in (2, 32):
        assert_close(model.embed_query(CONVERSATIONS, mode=mode, batch_size=batch_size), vectors)
    assert_close(model.embed_query(CONVERSATIONS[::-1], mode=mode, batch_size=3).flip(0), vectors)
    for row, conversation in enumerate(CONVERSATIONS):
        assert_close(model.embed_query(conversation, mode=mode), vectors[row : row + 1])


def test_the_prompts_give_the_vectors_of_their_conversations(model: NativeRetrievalModel):
    prompts, wanted = prompts_of(model), model.embed_query(CONVERSATIONS)
    assert_close(model.embed_prompts(prompts), wanted)
    ids, mask = model.processor.pad(prompts)
    assert_close(model.embed_query(ids, attention_mask=mask), wanted)
    assert_close(model(ids, mask).query_embeddings.detach(), wanted)
    batch = model.processor(CONVERSATIONS)
    words = Words(*(batch[name] for name in ("word_ids", "word_positions", "word_mask", "turn_ids", "word_groups")))
    assert_close(model(batch["input_ids"], batch["attention_mask"], words=words).query_embeddings.detach(), wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("more", [0, 5])
def test_vectors_do_not_depend_on_the_padding(model: NativeRetrievalModel, mode: str, more: int):
    rows = prompts_of(model)
    read = None
    if mode == "generated":  # any tokens may be marked to read
        read = [[False] * (len(row) - 3 - i) + [True] * (3 + i) for i, row in enumerate(rows)]
    alone = [
        model(torch.tensor([row]), readout_mask=torch.tensor([read[i]]) if read else None).query_embeddings
        for i, row in enumerate(rows)
    ]
    for side, filler in (("left", 0), ("left", 77), ("right", 77)):
        extra = [[filler] * (max(map(len, rows)) + more)]  # a row that makes all others wider

        def batch(values: list, value: Any, side: str = side, extra: list = extra) -> torch.Tensor:
            return pad([*values, extra[0]], value, side)[:-1]

        mask = batch([[1] * len(row) for row in rows], 0)
        readout = batch(read, False).bool() if read else None
        assert_close(model(batch(rows, filler), mask, readout).query_embeddings, torch.cat(alone))


def test_a_string_is_a_conversation_of_one_question(tiny_model: NativeRetrievalModel):
    texts = ["Who built it?", "When was the library founded?"]
    vectors = tiny_model.embed_query(texts)
    assert_close(vectors, tiny_model.embed_query([[user(text)] for text in texts]))
    assert_close(tiny_model.embed_query(texts[1]), vectors[1:])
    assert_close(tiny_model.embed_query(tuple(texts)), vectors)


def test_the_input_is_left_as_it_was(tiny_model: NativeRetrievalModel):
    conversation = [user("a <|im_end|>"), user(""), user("b"), assistant(" c ")]
    before = json.dumps(conversation)
    tiny_model.embed_query(conversation)
    assert json.dumps(conversation) == before


def test_history_changes_the_vector(tiny_model: NativeRetrievalModel):
    history = [user("Tell me about the library."), assistant("It is old.")]
    other = [user("Tell me about the castle."), assistant("It is old.")]
    a, b = tiny_model.embed_query([[*history, user("Who owned it?")], [*other, user("Who owned it?")]])
    assert (a - b).norm() > 1e-3


def test_states_computed_before_give_the_same_vectors(model: NativeRetrievalModel, monkeypatch: pytest.MonkeyPatch):
    ids, mask = model.processor.pad(prompts_of(model))
    states = model.prefill(ids, mask, use_cache=False).hidden_states
    assert states.shape == (*ids.shape, len(model.config.hidden_state_layers), 32)
    wanted = model(ids, mask).query_embeddings
    monkeypatch.setattr(model.backbone, "forward", None)  # is not run
    assert torch.equal(model(ids, mask, hidden_states=states).query_embeddings, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_after_the_last_one_read_run_for_generation_alone(make_model, family: str):
    model = make_model(family, hidden_state_layers=[1, 2])
    block = next(m for name, m in model.backbone.base_model.named_modules() if name.endswith(".3"))
    runs = []
    handle = block.register_forward_hook(lambda *_: runs.append(1))
    whole = model.embed_query(CONVERSATIONS)
    assert runs
    runs.clear()
    assert torch.equal(model.embed_query(CONVERSATIONS), whole)
    assert bool(runs) == (family == "gpt2")  # whose layers cannot be cut off
    handle.remove()
    prompt = torch.tensor(prompts_of(model)[:1])
    with torch.no_grad():
        states = model.backbone(prompt, output_hidden_states=True).hidden_states
    read = model.prefill(prompt, use_cache=False).hidden_states
    assert len(states) == 5 and all(torch.equal(read[:, :, i], states[layer]) for i, layer in enumerate((1, 2)))


def test_models_around_one_backbone_read_their_own_layers(make_model, make_backbone):
    backbone = make_backbone("llama")
    models = [make_model(backbone=backbone, hidden_state_layers=layers) for layers in ([1, 2], [1, 2, 4])]
    wanted = [make_model(hidden_state_layers=layers).embed_query(CONVERSATIONS) for layers in ([1, 2], [1, 2, 4])]
    for _ in range(2):
        for model, vectors in zip(models, wanted, strict=True):
            assert_close(model.embed_query(CONVERSATIONS), vectors)


# Training


def test_training_leaves_the_backbone_frozen_and_in_eval_mode(model: NativeRetrievalModel):
    model.train()
    assert model.training and model.query_head.training and not model.backbone.training
    assert not any(module.training for module in model.backbone.modules())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_gradients_reach_every_part_of_the_head_and_nothing_else(model: NativeRetrievalModel):
    ids, mask = model.processor.pad(prompts_of(model))
    model.train()
    (model(ids, mask).query_embeddings * torch.linspace(-1, 1, 32)).sum().backward()
    model.eval()
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            assert parameter.grad is None, name
            continue
        if ".selection." in name:  # a choice has no gradient
            assert parameter.grad is None, name
            continue
        assert parameter.requires_grad and parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if not name.endswith(("in_proj_bias", "share.bias")):  # these change no softmax
            assert parameter.grad.abs().max() > 0, name
    model.zero_grad()


# Starting from a backbone


def test_from_a_folder(backbone_dir: Path, make_backbone: Callable[..., PreTrainedModel], stub_teacher: StubTeacher):
    model = from_backbone(str(backbone_dir), stub_teacher, head_dim=32, head_num_attention_heads=4)
    assert model.config.embedding_dim == stub_teacher.dimension
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (32, 4)
    for name, weight in make_backbone("llama").state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight), name


def test_the_encoder_starts_from_the_teachers_vectors_of_single_pieces(make_model, stub_teacher: StubTeacher):
    """Less their mean, with as many numbers as a code has: of 32 here all."""
    model = make_model(teacher=stub_teacher, encoder_code_dim=32)
    encoder, words = model.query_head.encoder, ["bridge", "museum", "library"]
    codes = torch.tensor(model.processor.encode_words(words))[:, 0]
    with torch.no_grad():
        values = encoder.value(encoder.codes(codes))
    vectors = torch.from_numpy(stub_teacher.encode(words))
    seen, wanted = values[:, None] - values, (vectors[:, None] - vectors) / 2  # which have no mean in them
    torch.testing.assert_close(seen, wanted, atol=1e-3, rtol=0)


class BertTeacher(StubTeacher):
    """With layers that a word encoder of its width can start from."""

    def __init__(self, width: int = 32):
        super().__init__()
        sizes = {"vocab_size": 30_522, "hidden_size": width, "num_hidden_layers": 3, "max_position_embeddings": 40}
        config = BertConfig(**sizes, num_attention_heads=width // 32, intermediate_size=4 * width)
        self.transformer = BertModel(config, add_pooling_layer=False).eval()
        with torch.no_grad():
            for parameter in self.transformer.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1) * 0.1)


def test_the_encoder_starts_from_the_layers_of_a_bert(make_model):
    """Of one layer: with all numbers in a code and nothing from the values, its mean is that of the BERT's first layer."""
    teacher = BertTeacher()
    bert = teacher.transformer
    model = make_model(teacher=teacher, encoder_code_dim=64, encoder_num_layers=1)
    encoder, ids = model.query_head.encoder, torch.tensor(model.processor.encode_words(["who built the old bridge"]))
    nowhere = torch.zeros_like(ids)
    with torch.no_grad():
        encoder.value.weight.zero_()
        seen = encoder.linear_out.weight @ torch.eye(32)
        wanted = bert(input_ids=ids, output_hidden_states=True).hidden_states[1].mean(1)
        vector = model(words=Words(ids, nowhere, nowhere == 0, nowhere, nowhere)).query_embeddings
    assert torch.equal(seen, torch.eye(32))
    torch.testing.assert_close(vector, torch.nn.functional.normalize(wanted, dim=-1), atol=1e-3, rtol=0)
    # Two layers are evenly spaced ones; and of another width none.
    two = make_model(teacher=teacher).query_head.encoder.layers
    for layer, number in zip(two, (0, 1), strict=True):
        assert torch.equal(layer.linear1.weight, bert.encoder.layer[number].intermediate.dense.weight)
    other = make_model(teacher=BertTeacher(64)).query_head.encoder
    assert other.linear_out.weight.detach().abs().max() < 0.5


class CountingTeacher(StubTeacher):
    def __init__(self, tokenizer: PreTrainedTokenizerFast | None = None):
        super().__init__(tokenizer)
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str], *args, **kwargs) -> np.ndarray:
        self.texts += texts
        return super().encode(texts, *args, **kwargs)


def test_for_a_head_without_words_no_vocabulary_is_embedded(make_model):
    teacher = CountingTeacher()
    assert make_model(teacher=teacher, word_vocab_size=None).config.embedding_dim == 32
    assert len(teacher.texts) <= 1  # for its width
    model = make_model(teacher=teacher)
    assert model.config.word_vocab_size == len(model.processor.word_tokenizer) == 30_522
    assert len(teacher.texts) > 10_000  # and with one, each spelling once
    assert len(teacher.texts) <= len(set(teacher.texts)) + 2  # besides, one for its width


@pytest.mark.parametrize("fields", [{}, {"word_vocab_size": None}])
def test_a_teacher_of_another_dimension_is_refused(make_model, stub_teacher: StubTeacher, fields: dict):
    with pytest.raises(ValueError, match="32.*48") as error:
        make_model(teacher=stub_teacher, embedding_dim=48, **fields)
    assert_one_line(error)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_teacher_with_a_zero_or_nan_vector_is_refused(make_model, tiny_tokenizer, value: float):
    class Broken(StubTeacher):
        def encode(self, texts: Sequence[str], kind: str = "query", progress: str | None = None) -> np.ndarray:
            vectors = super().encode(texts, kind, progress)
            vectors[7:8] = value
            return vectors

    with pytest.raises(ValueError, match=r"token \d+ \(.+\) a zero or non-finite") as error:
        make_model(teacher=Broken(tiny_tokenizer))
    assert_one_line(error)


def test_a_tokenizer_larger_than_the_backbone_is_refused(make_backbone, tiny_tokenizer: PreTrainedTokenizerFast):
    small = make_backbone("llama", vocab_size=len(tiny_tokenizer) - 1)
    with pytest.raises(ValueError, match=f"{len(tiny_tokenizer)} tokens") as error:
        from_backbone(small, tokenizer=tiny_tokenizer, embedding_dim=32)
    assert_one_line(error)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_state_layers": [9]}, r"\[9\]"),
        ({"encoder_dims": 32}, "encoder_dim"),
        ({"copy_num_heads": 2}, "copy_num_heads"),
        ({"num_probe_tokens": 3}, "num_probe_tokens"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0"),
    ],
)
def test_a_bad_field_is_refused(make_model: Callable[..., NativeRetrievalModel], fields: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        make_model(**fields)
    assert_one_line(error)


@pytest.mark.parametrize("name", ["no/such-model", "./nowhere", "/nowhere/at/all", ""])
def test_a_backbone_that_is_not_there(name: str):
    with pytest.raises(OSError, match="cannot be loaded") as error:
        from_backbone(name, embedding_dim=8)
    assert_one_line(error)


def test_starting_leaves_the_given_backbone_as_it_was(make_backbone, make_model):
    backbone, wanted = make_backbone("gemma3"), make_backbone("gemma3")
    make_model(backbone=backbone).embed_query(CONVERSATIONS, mode="generated")
    for name, weight in wanted.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], weight), name
    assert backbone.config.to_dict() == wanted.config.to_dict()
    assert backbone.generation_config.to_dict() == wanted.generation_config.to_dict()
    ids = torch.arange(3, 30)[None]
    assert torch.equal(backbone(ids).logits, wanted(ids).logits)


# Bad input


BAD_QUERIES = {
    "nothing": (None, "NoneType"),
    "a number": (7, "int"),
    "an empty string": ("", "empty"),
    "a blank string among others": (["Who?", ""], "query 1"),
    "an empty conversation among others": ([CONVERSATIONS[0], []], "conversation 1"),
    "an unknown role": ([{"role": "robot", "content": "Hi"}], "robot"),
    "no role": ([{"content": "Hi"}], "role"),
    "strings and conversations": (["Who?", CONVERSATIONS[0]], "mixes"),
    "token ids in a list": ([[1, 2, 3]], "int"),
    "token ids of one row": (torch.tensor([1, 2, 3]), "input_ids"),
    "no token ids": (torch.tensor([[]]).long(), "input_ids"),
    "states": (torch.zeros(1, 3), "input_ids"),
    "a token outside the vocabulary": (torch.tensor([[5, 4711]]), "4711"),
    "a negative token": (torch.tensor([[5, -100]]), "-100"),
    "token ids of several rows, which may be padded": (torch.tensor([[5, 6], [7, 8]]), "attention_mask"),
}


@pytest.mark.parametrize(("queries", "message"), BAD_QUERIES.values(), ids=BAD_QUERIES.keys())
@pytest.mark.parametrize("mode", MODES)
def test_bad_queries(tiny_model: NativeRetrievalModel, queries: Any, message: str, mode: str):
    with pytest.raises(ValueError, match=message) as error:
        tiny_model.embed_query(queries, mode=mode)
    assert_one_line(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "psychic"}, "mode='psychic'"),
        ({"mode": "probe"}, "mode='probe'"),
        ({"mode": ""}, "mode=''"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"past_key_values": {}}, "past_key_values is a dict"),
    ],
)
def test_bad_arguments(tiny_model: NativeRetrievalModel, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        tiny_model.embed_query("Who?", **arguments)
    assert_one_line(error)


def test_bad_tensors(tiny_model: NativeRetrievalModel):
    ids = torch.tensor(prompts_of(tiny_model)[:1])
    states = tiny_model.prefill(ids).hidden_states
    calls = {
        "hidden_states": lambda: tiny_model(ids[:, 1:], hidden_states=states),
        "readout_mask": lambda: tiny_model(ids, readout_mask=torch.zeros_like(ids, dtype=torch.bool)),
        "attention_mask": lambda: tiny_model.embed_query(ids, attention_mask=torch.ones(1, 3)),
        "token in each row": lambda: tiny_model.embed_query(ids, attention_mask=torch.zeros_like(ids)),
        "input_ids": tiny_model,
        "prompt 1 is empty": lambda: tiny_model.embed_prompts([[5], []]),
        "without its backbone": lambda: NativeRetrievalModel(tiny_model.config).generate(ids),
        "loaded without": lambda: NativeRetrievalModel(tiny_model.config)(ids),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert_one_line(error)


def test_no_queries_give_no_vectors(tiny_model: NativeRetrievalModel):
    assert tiny_model.embed_query([]).shape == (0, 32) == tiny_model.embed_prompts([]).shape
    with pytest.raises(ValueError, match="empty") as error:
        tiny_model.embed_query([], return_cache=True)
    assert_one_line(error)


@pytest.mark.parametrize(("tokens", "mode"), [(CONTEXT + 1, "context"), (CONTEXT + 1, "generated")])
def test_a_prompt_beyond_the_backbones_context_is_refused(make_model, tokens: int, mode: str):
    # GPT-2 has no position past its context: without a check, torch fails deep inside an embedding.
    model = make_model("gpt2")
    model.embed_prompts([[7] * CONTEXT])
    with pytest.raises(ValueError, match=f"{tokens} tokens") as error:
        model.embed_prompts([[7] * 5, [7] * tokens], mode=mode, batch_size=2)
    assert_one_line(error)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_longest_prompt_leaves_room_for_a_query(make_model: Callable[..., NativeRetrievalModel], family: str):
    model = stir(make_model(family))
    limit = model.processor.max_prompt_tokens
    assert CONTEXT // 2 < limit < CONTEXT
    assert len(model.processor.encode([user("word " * CONTEXT)])) <= limit
    assert torch.isfinite(model.embed_prompts([[7] * limit], mode="generated")).all()
