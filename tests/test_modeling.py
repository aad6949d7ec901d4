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
    user,
)
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from modeling_native_retrieval import NativeRetrievalModel, build_prompt

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


@pytest.mark.parametrize("mode", MODES)
def test_vectors_do_not_depend_on_the_padding_side(model: NativeRetrievalModel, mode: str):
    rows = prompts_of(model)
    read = None
    if mode == "generated":  # any tokens may be marked to read
        read = [[False] * (len(row) - 3 - i) + [True] * (3 + i) for i, row in enumerate(rows)]
    outputs = {}
    for side in ("left", "right"):
        mask = pad([[1] * len(row) for row in rows], 0, side)
        readout = pad(read, False, side) if read else None
        outputs[side] = model(pad(rows, model.tokenizer.pad_token_id, side), mask, readout).query_embeddings
    assert_close(outputs["left"], outputs["right"])
    alone = [
        model(torch.tensor([row]), readout_mask=torch.tensor([read[i]]) if read else None).query_embeddings
        for i, row in enumerate(rows)
    ]
    assert_close(outputs["left"], torch.cat(alone))


def test_what_stands_in_the_padding_does_not_matter(tiny_model: NativeRetrievalModel):
    rows = prompts_of(tiny_model)
    mask = pad([[1] * len(row) for row in rows], 0, "left")
    vectors = [tiny_model(pad(rows, filler, "left"), mask).query_embeddings for filler in (0, 77)]
    assert_close(*vectors)


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
    rows = prompts_of(model)
    ids, mask = pad(rows, 0, "left"), pad([[1] * len(row) for row in rows], 0, "left")
    states = model.prefill(ids, mask, use_cache=False).hidden_states
    assert states.shape == (*ids.shape, len(model.config.hidden_state_layers), 32)
    wanted = model(ids, mask).query_embeddings
    monkeypatch.setattr(model.backbone, "forward", None)  # is not run
    assert torch.equal(model(ids, mask, hidden_states=states).query_embeddings, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_behind_the_last_one_read_run_for_generation_alone(make_model, family: str):
    model = make_model(family, hidden_state_layers=[1, 2])
    blocks = [m for name, m in model.backbone.base_model.named_modules() if name.endswith(".2")]
    runs = []
    handle = blocks[0].register_forward_hook(lambda *_: runs.append(1))
    modes = ("context", "probe")
    whole = {mode: model.embed_query(CONVERSATIONS, mode=mode) for mode in modes}
    assert runs
    for mode in modes:
        assert torch.equal(model.embed_query(CONVERSATIONS, mode=mode), whole[mode])
    runs.clear()
    model.embed_query(CONVERSATIONS, mode="context")
    assert bool(runs) == (family == "gpt2")  # whose layers cannot be cut off
    handle.remove()
    prompt = torch.tensor([model.build_prompt(CONVERSATIONS[0])])
    with torch.no_grad():
        states = model.backbone(prompt, output_hidden_states=True).hidden_states
    read = model.prefill(prompt, use_cache=False).hidden_states
    assert len(states) == 5 and all(torch.equal(read[:, :, i], states[layer]) for i, layer in enumerate((1, 2)))


def test_states_of_other_tokens_are_refused(tiny_model: NativeRetrievalModel):
    ids = torch.tensor([prompts_of(tiny_model)[0]])
    states = tiny_model.prefill(ids).hidden_states
    with pytest.raises(ValueError, match="hidden_states") as error:
        tiny_model(ids[:, 1:], hidden_states=states)
    assert_one_line(error)


def test_a_row_without_a_token_to_read_is_refused(tiny_model: NativeRetrievalModel):
    ids = torch.tensor([prompts_of(tiny_model)[0]])
    with pytest.raises(ValueError, match="readout_mask") as error:
        tiny_model(ids, readout_mask=torch.zeros_like(ids, dtype=torch.bool))
    assert_one_line(error)


# Training


def test_training_leaves_the_backbone_frozen_and_in_eval_mode(model: NativeRetrievalModel):
    model.train()
    assert model.training and model.head.training and not model.backbone.training
    assert not any(module.training for module in model.backbone.modules())
    assert not any(p.requires_grad for p in model.backbone.parameters())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_gradients_reach_the_head_and_nothing_else(model: NativeRetrievalModel):
    rows = prompts_of(model)
    ids, mask = pad(rows, 0, "left"), pad([[1] * len(row) for row in rows], 0, "left")
    model.train()
    output = model.copy_path.antecedent_output.weight  # starts at zero, and hides the values before it
    torch.nn.init.normal_(output)
    (model(ids, mask).query_embeddings * torch.linspace(-1, 1, 32)).sum().backward()
    torch.nn.init.zeros_(output)
    model.eval()
    backbone = {id(p) for p in model.backbone.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in backbone or name.startswith("probe."):  # which was not asked
            assert parameter.grad is None, name
            continue
        assert parameter.requires_grad and parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if "in_proj_bias" not in name:  # attention's key bias changes no softmax
            assert parameter.grad.abs().max() > 0, name
    model.zero_grad()


# Starting from a backbone


def test_from_a_folder(backbone_dir: Path, make_backbone: Callable[..., PreTrainedModel], stub_teacher: StubTeacher):
    model = NativeRetrievalModel.from_backbone(str(backbone_dir), stub_teacher, head_dim=32, head_num_attention_heads=4)
    assert model.config.embedding_dim == stub_teacher.dimension
    for name, weight in make_backbone("llama").state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight), name


def test_the_copy_path_starts_from_the_teachers_vectors_of_single_tokens(
    make_model: Callable[..., NativeRetrievalModel],
    stub_teacher: StubTeacher,
    tiny_tokenizer: PreTrainedTokenizerFast,
):
    model = make_model(teacher=stub_teacher)
    for word in (" bridge", " museum", " library"):
        ids = tiny_tokenizer(word, add_special_tokens=False)["input_ids"]
        wanted = torch.from_numpy(stub_teacher.encode([tiny_tokenizer.decode(ids[:1]).strip()])[0])
        assert_close(model.copy_path.token_values.weight[ids[0]].detach(), wanted)


def test_a_new_model_starts_from_the_words(make_backbone, tiny_tokenizer: PreTrainedTokenizerFast, stub_teacher):
    """Everything beside them starts at zero; transformers leaves out the initialisation of some modules silently."""
    model = NativeRetrievalModel.from_backbone(
        make_backbone("llama"), stub_teacher, tokenizer=tiny_tokenizer, num_probe_tokens=3
    )
    for layer in (model.head.linear_out, model.head.skip, model.copy_path.state_value):
        assert not layer.weight.any()
    tokens = tiny_tokenizer("where is the bridge", add_special_tokens=False)["input_ids"]
    words = torch.from_numpy(stub_teacher.encode([tiny_tokenizer.decode([i]) for i in tokens]))
    vector = model(torch.tensor([tokens]), words_only=True).query_embeddings
    assert torch.allclose(vector[0], torch.nn.functional.normalize(words.mean(0), dim=0), atol=1e-5)


def test_a_new_probe_changes_nothing(make_backbone, tiny_tokenizer: PreTrainedTokenizerFast, stub_teacher):
    model = NativeRetrievalModel.from_backbone(
        make_backbone("llama"), stub_teacher, tokenizer=tiny_tokenizer, num_probe_tokens=3
    )
    assert_close(model.embed_query(CONVERSATIONS, mode="probe"), model.embed_query(CONVERSATIONS, mode="context"))


def test_a_new_probe_passes_as_the_words_that_ask_for_a_query(
    make_backbone, tiny_tokenizer: PreTrainedTokenizerFast, stub_teacher
):
    model = NativeRetrievalModel.from_backbone(
        make_backbone("llama"), stub_teacher, tokenizer=tiny_tokenizer, num_probe_tokens=3
    )
    words = tiny_tokenizer(model.config.query_prompt, add_special_tokens=False)["input_ids"][-3:]
    rows = prompts_of(model)
    states = model.pass_probe(model.prefill(*model.pad(rows)))
    assert_close(states, model.prefill(*model.pad([row + words for row in rows])).hidden_states[:, -3:])


def test_a_probe_sees_the_same_whether_keys_are_written_out_for_each_head_or_not(model, monkeypatch):
    prefill = model.prefill(*model.pad(prompts_of(model)))
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0")
    written_out = model.pass_probe(prefill)
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    assert_close(model.pass_probe(prefill), written_out)


def test_a_branch_that_keeps_nothing_is_as_long_after_a_pass(model: NativeRetrievalModel):
    ids, mask = model.pad([[5, 6, 7, 8], [5, 6, 7, 8]])
    cache = model.prefill(ids, mask).past_key_values
    states = []
    for branch in (cache.branch(), cache.branch(keeps=False)):
        model.prefill(torch.cat((ids, ids), dim=1), torch.cat((mask, mask), dim=1), branch)
        states.append(branch.recorded()[2])
        lengths = [layer.get_seq_length() for layer in branch.layers]
        assert lengths == [8 if branch._keeps else 4] * len(lengths)
    assert torch.equal(*states)


def test_the_adapter_acts_on_the_probe_alone(model: NativeRetrievalModel):
    ids, mask = model.pad(prompts_of(model))
    prefill = model.prefill(ids, mask)
    before = [layer.keys.clone() for layer in prefill.past_key_values.layers]
    states = model.pass_probe(prefill)
    for weight in model.probe.up.values():
        weight.data.mul_(-1)
    assert (model.pass_probe(prefill) - states).abs().max() > 1e-4
    for weight in model.probe.up.values():
        weight.data.mul_(-1)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, prefill.past_key_values.layers, strict=True))
    assert torch.equal(model.prefill(ids, mask).hidden_states, prefill.hidden_states)


def test_gradients_reach_the_probe_through_its_own_tokens(tiny_model: NativeRetrievalModel):
    ids, mask = tiny_model.pad(prompts_of(tiny_model))
    tiny_model(ids, mask, use_probe=True).query_embeddings[:, 0].sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in tiny_model.probe.named_parameters() if "norm" not in n
    )
    assert all(p.grad is None for p in tiny_model.backbone.parameters())


def test_a_model_without_a_probe_says_so(make_model: Callable[..., NativeRetrievalModel]):
    with pytest.raises(ValueError, match="num_probe_tokens=0"):
        make_model(num_probe_tokens=0).embed_query("where is the bridge?", mode="probe")


def test_words_do_not_depend_on_order_or_padding(tiny_model: NativeRetrievalModel):
    ids = torch.tensor([[5, 6, 7, 8]])
    vector = tiny_model(ids, words_only=True).query_embeddings
    assert torch.allclose(tiny_model(ids.flip(1), words_only=True).query_embeddings, vector, atol=1e-6)
    padded = torch.tensor([[9, 9, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert torch.allclose(tiny_model(padded, mask, words_only=True).query_embeddings, vector, atol=1e-6)


def test_words_need_a_copy_path(make_model: Callable[..., NativeRetrievalModel]):
    with pytest.raises(ValueError, match="copy_num_heads=0"):
        make_model(copy_num_heads=0)(torch.tensor([[5]]), words_only=True)


def test_a_teacher_of_another_dimension_is_refused(
    make_model: Callable[..., NativeRetrievalModel], stub_teacher: StubTeacher
):
    with pytest.raises(ValueError, match="32.*48") as error:
        make_model(teacher=stub_teacher, embedding_dim=48)
    assert_one_line(error)


def test_a_teacher_of_another_dimension_is_refused_without_a_copy_path(
    make_model: Callable[..., NativeRetrievalModel], stub_teacher: StubTeacher
):
    with pytest.raises(ValueError, match="32.*48") as error:
        make_model(teacher=stub_teacher, embedding_dim=48, copy_num_heads=0)
    assert_one_line(error)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_teacher_with_a_zero_or_nan_vector_is_refused(
    make_model: Callable[..., NativeRetrievalModel], tiny_tokenizer: PreTrainedTokenizerFast, value: float
):
    class Broken(StubTeacher):
        def encode(self, texts: Sequence[str], kind: str = "query", progress: str | None = None) -> np.ndarray:
            vectors = super().encode(texts, kind, progress)
            vectors[7] = value
            return vectors

    with pytest.raises(ValueError, match="7") as error:
        make_model(teacher=Broken(tiny_tokenizer))
    assert_one_line(error)


def test_a_tokenizer_larger_than_the_backbone_is_refused(
    make_backbone: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
):
    small = make_backbone("llama", vocab_size=len(tiny_tokenizer) - 1)
    with pytest.raises(ValueError, match=f"{len(tiny_tokenizer)} tokens") as error:
        NativeRetrievalModel.from_backbone(small, tokenizer=tiny_tokenizer, embedding_dim=32)
    assert_one_line(error)


def test_a_bad_field_is_refused(make_model: Callable[..., NativeRetrievalModel]):
    with pytest.raises(ValueError, match=r"\[9\]"):
        make_model(hidden_state_layers=[9])


def test_starting_leaves_the_given_backbone_as_it_was(
    make_backbone: Callable[..., PreTrainedModel], make_model: Callable[..., NativeRetrievalModel]
):
    backbone, wanted = make_backbone("gemma3"), make_backbone("gemma3")
    make_model(backbone=backbone)
    for name, weight in wanted.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], weight), name
    assert backbone.config.to_dict() == wanted.config.to_dict()
    ids = torch.arange(3, 30)[None]
    assert torch.equal(backbone(ids).logits, wanted(ids).logits)


# Bad input


BAD_QUERIES = {
    "nothing": (None, "NoneType"),
    "a number": (7, "int"),
    "an empty string": ("", "empty"),
    "a blank string": (" \n", "empty"),
    "a blank string among others": (["Who?", ""], "query 1"),
    "an empty conversation": ([[]], "empty"),
    "an empty conversation among others": ([CONVERSATIONS[0], []], "conversation 1"),
    "an unknown role": ([{"role": "robot", "content": "Hi"}], "robot"),
    "a role with a line end": ([{"role": "us\ner", "content": "Hi"}], "role"),
    "a role that is no string": ([{"role": 3, "content": "Hi"}], "role"),
    "a role that is a list": ([{"role": ["user"], "content": "Hi"}], "role"),
    "no role": ([{"content": "Hi"}], "role"),
    "no content": ([{"role": "user"}], "content"),
    "content that is a number": ([{"role": "user", "content": 3}], "int"),
    "content that is a list of parts": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "list"),
    "an empty last turn": ([*CONVERSATIONS[0], assistant("They did."), user("")], "empty"),
    "a blank last turn": ([*CONVERSATIONS[0], assistant("They did."), user(" \n\t")], "empty"),
    "no turn with text": ([assistant("")], "text"),
    "a system message alone": ([{"role": "system", "content": "Be kind."}], "text"),
    "strings and conversations": (["Who?", CONVERSATIONS[0]], "mixes"),
    "conversations and strings": ([CONVERSATIONS[0], "Who?"], "mixes"),
    "messages and strings": ([user("Who?"), "Who?"], "mixes"),
    "messages and conversations": ([user("Who?"), CONVERSATIONS[0]], "mixes"),
    "a message alone": ({"role": "user", "content": "Who?"}, "dict"),
    "token ids": ([1, 2, 3], "int"),
    "a conversation of strings": ([["Who?", "When?"]], "message 0"),
    "a last turn longer than the backbone's context": ([user("word " * CONTEXT)], "max_prompt_tokens"),
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
        ({"mode": ""}, "mode=''"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -1}, "batch_size=-1"),
    ],
)
def test_bad_arguments(tiny_model: NativeRetrievalModel, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        tiny_model.embed_query("Who?", **arguments)
    assert_one_line(error)


def test_no_queries_give_no_vectors(tiny_model: NativeRetrievalModel):
    assert tiny_model.embed_query([]).shape == (0, 32)
    with pytest.raises(ValueError, match="empty") as error:
        tiny_model.embed_query([], return_cache=True)
    assert_one_line(error)


def prompt_length(model: NativeRetrievalModel, text: str) -> int:
    return len(build_prompt(model.tokenizer, [user(text)], 10 * CONTEXT))


@pytest.mark.parametrize(("limit", "mode"), [(CONTEXT + 200, "context"), (CONTEXT, "generated")])
def test_a_prompt_beyond_the_backbones_context_is_refused_whatever_the_config_says(
    make_model: Callable[..., NativeRetrievalModel], limit: int, mode: str
):
    # GPT-2 has no position past its context: without a check, torch fails deep inside an embedding.
    with pytest.raises(ValueError) as error:
        model = make_model("gpt2", max_prompt_tokens=limit)
        text = "word " * CONTEXT
        while prompt_length(model, text) > limit:
            text = text[:-5]
        model.embed_query(text, mode=mode)
    assert_one_line(error)


def test_the_longest_prompt_leaves_room_for_a_query(make_model: Callable[..., NativeRetrievalModel]):
    model = make_model("gpt2")
    limit = model.config.max_prompt_tokens
    assert CONTEXT // 2 < limit < CONTEXT
    text = "word " * CONTEXT
    while prompt_length(model, text) > limit:
        text = text[:-5]
    assert limit - prompt_length(model, text) < 10
    assert torch.isfinite(model.embed_query(text, mode="generated")).all()
