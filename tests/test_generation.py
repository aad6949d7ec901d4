"""Generation beside vectors: the backbone's own tokens, one cache for an agent's turns, and written queries."""

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BACKBONES,
    CONVERSATIONS,
    MODES,
    SLIDING_WINDOW,
    assert_close,
    assert_one_line,
    assistant,
    prompts_of,
    stir,
    take_steps,
    user,
)
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, TextStreamer

from modeling_native_retrieval import NativeRetrievalModel, QueryCache

GREEDY = {"do_sample": False, "pad_token_id": 0}
# An end token, which a random backbone may write at any time, would make a test of twelve tokens one of two.
TWELVE = {**GREEDY, "max_new_tokens": 12, "eos_token_id": None}


def cached(model: NativeRetrievalModel, conversations: Any, **arguments) -> QueryCache:
    return model.embed_query(conversations, return_cache=True, **arguments).past_key_values


def of_cache(cache: QueryCache) -> dict[str, Any]:
    return {"input_ids": cache.input_ids, "attention_mask": cache.attention_mask, "past_key_values": cache}


def embedded(model: NativeRetrievalModel, queries: Any, **arguments) -> torch.Tensor:
    """The vectors alone, with a cache as well."""
    return getattr(found := model.embed_query(queries, **arguments), "query_embeddings", found)


@contextmanager
def scripted(model: NativeRetrievalModel, rows: list[list[int]]):
    """Makes the backbone write these tokens, whatever it reads; a row is repeated from its last token."""
    steps = itertools.count()

    def rewrite(module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        step = next(steps)
        for i, row in enumerate(rows):
            logits[i, -1, row[min(step, len(row) - 1)]] = 1e4
        return logits

    handle = model.get_output_embeddings().register_forward_hook(rewrite)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def tokens_passed(model: NativeRetrievalModel):
    """Counts the tokens a row that go through the backbone."""
    counts: list[int] = []

    def count(module, args, kwargs):
        counts.append(kwargs["input_ids"].shape[1] if "input_ids" in kwargs else args[0].shape[1])

    handle = model.backbone.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def is_recurrent(cache: QueryCache) -> bool:
    return any(hasattr(layer, "recurrent_states") for layer in cache.past_key_values.layers)


# Generation without a cache


def continuations(backbone: PreTrainedModel | NativeRetrievalModel, rows: list[list[int]], pad) -> list[list[int]]:
    """Greedy continuations of one prompt and of all in one batch, and sampled ones of the batch."""
    found = []
    for batch, sample in ((rows[1:2], False), (rows, False), (rows, True)):
        torch.manual_seed(0)
        ids, mask = pad(batch)
        arguments = {**TWELVE, "do_sample": sample}
        found.append(backbone.generate(input_ids=ids, attention_mask=mask, **arguments)[:, ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize(("family", "tie"), BACKBONES)
def test_generation_is_the_backbones_own(family: str, tie: bool, make_backbone, make_model, tmp_path: Path):
    bare, model = make_backbone(family, tie), make_model(family, tie)
    rows, pad = prompts_of(model), model.processor.pad
    wanted = continuations(bare, rows, pad)
    assert continuations(model, rows, pad) == wanted
    before = model.embed_query(CONVERSATIONS)
    take_steps(model)
    assert (model.embed_query(CONVERSATIONS) - before).norm() > 0.1
    assert continuations(model, rows, pad) == wanted
    for name, weight in bare.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight), name
    model.save_pretrained(tmp_path)
    loaded = NativeRetrievalModel.from_pretrained(tmp_path)
    assert continuations(loaded, rows, pad) == wanted
    # As the bare backbone, it generates with a cache.
    assert loaded.backbone.config.use_cache and loaded.backbone.generation_config.use_cache


def test_a_padded_batch_generates_what_each_prompt_does_alone(model: NativeRetrievalModel):
    rows = prompts_of(model)
    ids, mask = model.processor.pad(rows)
    together = model.generate(ids, attention_mask=mask, **TWELVE)[:, ids.shape[1] :]
    for row, seen in zip(rows, together, strict=True):
        assert torch.equal(model.generate(torch.tensor([row]), **TWELVE)[0, len(row) :], seen)


def test_one_thread_may_embed_while_another_generates(tiny_model: NativeRetrievalModel):
    vectors = tiny_model.embed_query(CONVERSATIONS)
    written = tiny_model.embed_query(CONVERSATIONS, mode="generated")
    ids = torch.tensor(prompts_of(tiny_model)[1:2])
    answer = tiny_model.generate(ids, **TWELVE)

    def work(number: int) -> bool:
        if number % 3 == 0:
            return torch.allclose(tiny_model.embed_query(CONVERSATIONS), vectors, atol=1e-5)
        if number % 3 == 1:
            return torch.allclose(tiny_model.embed_query(CONVERSATIONS, mode="generated"), written, atol=1e-5)
        return torch.equal(tiny_model.generate(ids, **TWELVE), answer)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(30)))


def test_transformers_own_caches_are_the_backbones_business(tiny_model: NativeRetrievalModel):
    ids = torch.tensor(prompts_of(tiny_model)[1:2])
    wanted = tiny_model.backbone.generate(ids, **TWELVE)
    cache = DynamicCache(config=tiny_model.backbone.config)
    assert torch.equal(tiny_model.generate(ids, past_key_values=cache, **TWELVE), wanted)
    assert cache.get_seq_length() == wanted.shape[1] - 1
    with pytest.raises(ValueError, match="DynamicCache") as error:
        tiny_model.embed_query(CONVERSATIONS[1], past_key_values=cache)
    assert_one_line(error)


# An agent's turn: one cache for the vector, the answer, and the next turn


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("conversations", [CONVERSATIONS[1:2], CONVERSATIONS], ids=["one", "batch"])
def test_generation_goes_on_from_the_vectors_cache(model: NativeRetrievalModel, mode: str, conversations: list):
    ids, mask = model.processor.pad(prompts_of(model, conversations))
    wanted = model.backbone.generate(input_ids=ids, attention_mask=mask, **TWELVE)
    found = model.embed_query(conversations, mode=mode, return_cache=True)
    assert_close(found.query_embeddings, model.embed_query(conversations, mode=mode))
    assert torch.equal(found.input_ids, ids) and torch.equal(found.attention_mask, mask)
    with tokens_passed(model) as counts:
        seen = model.generate(**of_cache(found.past_key_values), **TWELVE)
    assert torch.equal(seen, wanted)
    # Its last token passes once more, before which a recurrent state cannot go back.
    assert counts == [ids.shape[1] if is_recurrent(found.past_key_values) else 1] + [1] * 11
    # As a user would call it who has laid the batch out herself, and what is found follows the prompts.
    found = cached(model, conversations, mode=mode)
    tool = model.tokenizer("Tool result: the bridge was built in 1874.", return_tensors="pt")["input_ids"]
    ids = torch.cat((ids, tool.expand(len(ids), -1)), dim=1)
    mask = F.pad(mask, (0, tool.shape[1]), value=1)
    wanted = model.backbone.generate(input_ids=ids, attention_mask=mask, **TWELVE)
    seen = model.generate(ids, attention_mask=mask, past_key_values=found, **TWELVE)
    assert torch.equal(seen, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_the_next_turn_passes_only_what_is_new(model: NativeRetrievalModel, mode: str):
    messages = [*CONVERSATIONS[1]]
    cache = cached(model, messages, mode=mode)
    for turn in range(3):
        ids = torch.tensor([model.processor.encode(messages)])
        answer = model.generate(ids, past_key_values=cache, **{**TWELVE, "max_new_tokens": 6})
        assert torch.equal(answer, model.backbone.generate(ids, **{**TWELVE, "max_new_tokens": 6}))
        text = model.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip() or "Yes."
        messages += [assistant(text), user(f"And who came after number {turn}, and when was that?")]
        whole = len(model.processor.encode(messages))
        with tokens_passed(model) as counts:
            found = model.embed_query(messages, mode="context", past_key_values=cache, return_cache=True)
        assert sum(counts) <= whole - (0 if is_recurrent(cache) else ids.shape[1] - 4), "the history passed again"
        assert found.past_key_values is cache
        assert_close(found.query_embeddings, model.embed_query(messages, mode="context"))
        assert_close(
            embedded(model, messages, mode=mode, past_key_values=cache), model.embed_query(messages, mode=mode)
        )


def test_what_goes_on_without_a_change_passes_once(model: NativeRetrievalModel):
    """The agent's own text of before, word for word: for recurrent layers too, whose states cannot be taken back."""
    cache = cached(model, CONVERSATIONS[1])
    half = model.generate(**of_cache(cache), **TWELVE)
    longer = torch.cat((half, torch.tensor([[7, 8, 9]])), dim=1)
    with tokens_passed(model) as counts:
        vector = embedded(model, longer, past_key_values=cache)
    assert counts == [4]  # and the token that generate had left
    assert_close(vector, model.embed_query(longer))
    assert_close(cache.hidden_states, model.prefill(longer).hidden_states)


@pytest.mark.parametrize("mode", MODES)
def test_a_vector_in_the_middle_of_a_generation_changes_nothing(model: NativeRetrievalModel, mode: str):
    cache = cached(model, CONVERSATIONS)
    ids, mask = cache.input_ids, cache.attention_mask
    wanted = model.backbone.generate(ids, attention_mask=mask, **TWELVE)
    half = model.generate(**of_cache(cache), **{**TWELVE, "max_new_tokens": 5})
    assert torch.equal(half, wanted[:, : half.shape[1]])
    longer = F.pad(mask, (0, 5), value=1)
    vectors = embedded(model, half, attention_mask=longer, mode=mode, past_key_values=cache)
    assert_close(vectors, model.embed_query(half, attention_mask=longer, mode=mode))
    rest = model.generate(half, attention_mask=longer, past_key_values=cache, **{**TWELVE, "max_new_tokens": 7})
    assert torch.equal(rest, wanted)


def test_rows_of_a_batch_go_on_by_different_lengths(model: NativeRetrievalModel):
    cache = cached(model, CONVERSATIONS)
    longer = [
        [*messages, {"role": "tool", "content": "It was built in 1874 by a printer. " * (i % 3 + 1)}]
        for i, messages in enumerate(CONVERSATIONS)
    ]
    ids, mask = model.processor.pad(prompts_of(model, longer))
    wanted = model.backbone.generate(ids, attention_mask=mask, **TWELVE)
    found = model.embed_query(longer, past_key_values=cache, return_cache=True)
    assert_close(found.query_embeddings, model.embed_query(longer))
    seen = model.generate(**of_cache(cache), **TWELVE)
    assert torch.equal(seen[:, -12:], wanted[:, -12:])
    # From the first turn on, with the batch as a user has padded it, and to a length that counts her columns.
    cache = cached(model, CONVERSATIONS)
    lengths = {"max_length": ids.shape[1] + 12, "min_length": ids.shape[1] + 3, "max_new_tokens": None}
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **{**TWELVE, **lengths}), wanted)
    again = torch.cat((ids, wanted[:, ids.shape[1] :]), dim=1)
    more = F.pad(mask, (0, 12), value=1)
    vectors = embedded(model, again, attention_mask=more, past_key_values=cache)
    assert_close(vectors, model.embed_query(again, attention_mask=more))


def test_only_some_rows_go_on(model: NativeRetrievalModel):
    """Short beside long, then only the short one longer, then padded anew: no real token is taken for padding."""
    cache = cached(model, CONVERSATIONS[:2])
    longer = [[*CONVERSATIONS[0], assistant("Ida Munro. " * 20), user("When?")], CONVERSATIONS[1]]
    ids, mask = model.processor.pad(prompts_of(model, longer))
    for _ in range(2):
        assert_close(embedded(model, longer, past_key_values=cache), model.embed_query(longer))
    with pytest.raises(ValueError, match="attention_mask") as error:
        model.generate(ids, past_key_values=cache, **TWELVE)
    assert_one_line(error)
    wanted = model.backbone.generate(ids, attention_mask=mask, **TWELVE)
    assert torch.equal(model.generate(ids, attention_mask=mask, past_key_values=cache, **TWELVE), wanted)


def test_rows_that_end_early(model: NativeRetrievalModel):
    """What generation pads them with is in the cache, and is not what the next turn holds."""
    end, filler = model.tokenizer.eos_token_id, model.tokenizer.pad_token_id
    cache = cached(model, CONVERSATIONS[:2])
    with scripted(model, [[9, end], [9, 11, 12, 13, 14, 15]]):
        said = model.generate(**of_cache(cache), max_new_tokens=6, do_sample=False, pad_token_id=filler)
    assert said[0, -6:].tolist() == [9, end] + 4 * [filler] and said[1, -6:].tolist() == [9, 11, 12, 13, 14, 15]
    prompts = [prompt + new for prompt, new in zip(prompts_of(model)[:2], ([9, end, 20], [9, 11, 12]), strict=True)]
    ids, mask = model.processor.pad(prompts)
    assert_close(embedded(model, ids, attention_mask=mask, past_key_values=cache), model.embed_prompts(prompts))


def test_logits_after_a_cache_are_those_of_an_uncached_run(model: NativeRetrievalModel):
    cache = cached(model, CONVERSATIONS[1])
    ids = torch.cat((cache.input_ids, model.tokenizer(" It was built in 1874.", return_tensors="pt")["input_ids"]), 1)
    arguments = {**TWELVE, "output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    seen, wanted = model.generate(ids, past_key_values=cache, **arguments), model.generate(ids, **arguments)
    assert type(seen) is type(wanted) and torch.equal(seen.sequences, wanted.sequences)
    assert torch.allclose(torch.stack(seen.logits), torch.stack(wanted.logits), atol=1e-4)
    assert seen.hidden_states is None and seen.attentions is None and len(seen.scores) == 12
    arguments |= {"output_hidden_states": True}
    states = model.generate(ids, past_key_values=cached(model, CONVERSATIONS[1]), **arguments).hidden_states
    assert len(states) == 12 and len(states[0]) == 5


def test_an_edited_history_passes_again_from_where_it_differs(model: NativeRetrievalModel):
    cache = cached(model, CONVERSATIONS[1])
    model.generate(**of_cache(cache), **TWELVE)
    for place, text in ((2, "It was founded in 1901."), (1, "Tell me about the lighthouse."), (0, "Answer at length.")):
        edited = [dict(message) for message in CONVERSATIONS[1]]
        edited[place]["content"] = text
        assert_close(embedded(model, edited, past_key_values=cache), model.embed_query(edited))
        ids = torch.tensor([model.processor.encode(edited)])
        seen = model.generate(ids, past_key_values=cache, **TWELVE)
        assert torch.equal(seen, model.backbone.generate(ids, **TWELVE))
    for other in (CONVERSATIONS[0], CONVERSATIONS[1][1:2], [*CONVERSATIONS[1], *CONVERSATIONS[0]]):  # shorter, longer
        assert_close(embedded(model, other, past_key_values=cache), model.embed_query(other))


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_window_that_could_not_be_cropped_is_not_cropped_later(make_model, family: str):
    model = stir(make_model(family))
    prompt = [*model.processor.encode(CONVERSATIONS[1]), *range(20, 50)]
    cache = model.embed_query(torch.tensor([prompt]), return_cache=True).past_key_values
    model.generate(torch.tensor([[*prompt[:-2], 3]]), past_key_values=cache, **{**TWELVE, "max_new_tokens": 4})
    for shared in (len(prompt) - SLIDING_WINDOW, len(prompt) - SLIDING_WINDOW - 3, 6, 4, 2, 1, 0):
        edited = torch.tensor([[*prompt[:shared], 3, 4, 5]])
        assert_close(embedded(model, edited, past_key_values=cache), model.embed_query(edited))
        wanted = model.backbone.generate(edited, **TWELVE)
        assert torch.equal(model.generate(edited, past_key_values=cache, **TWELVE), wanted)


def test_a_written_query_is_not_in_the_prompts_cache(model: NativeRetrievalModel):
    cache = cached(model, CONVERSATIONS, mode="generated")
    assert cache.past_key_values.get_seq_length() == cache.hidden_states.shape[1] == cache.input_ids.shape[1]
    before = [copy.deepcopy(layer) for layer in cache.past_key_values.layers]
    for _ in range(2):
        output = model.embed_prefilled(cache, "generated")
        assert_close(output.query_embeddings, model.embed_query(CONVERSATIONS, mode="generated"))
    for layer, old in zip(cache.past_key_values.layers, before, strict=True):
        if hasattr(layer, "keys"):
            assert torch.equal(layer.keys, old.keys) and torch.equal(layer.values, old.values)
        else:
            assert torch.equal(layer.recurrent_states[0], old.recurrent_states[0])


def test_a_cache_without_keys_and_values_passes_again(model: NativeRetrievalModel):
    ids, mask = model.processor.pad(prompts_of(model))
    wanted = model.backbone.generate(ids, attention_mask=mask, **TWELVE)
    caches = {
        "not kept": model.prefill(ids, mask, use_cache=False),
        "of written queries": model.write_queries(model.prefill(ids, mask))[0],
        "not filled": QueryCache(ids, mask),
    }
    for name, cache in caches.items():
        assert torch.equal(
            model.generate(ids, attention_mask=mask, past_key_values=copy.copy(cache), **TWELVE), wanted
        ), name
        assert_close(embedded(model, CONVERSATIONS, past_key_values=cache), model.embed_query(CONVERSATIONS))


def test_what_interrupts_a_pass_does_not_spoil_the_cache(model: NativeRetrievalModel):
    """A key is pressed, or memory ends, between two layers: some have taken the new tokens in, and some have not."""
    longer = [*CONVERSATIONS[1], assistant("A printer."), user("Until when did she own it?")]
    ids = torch.tensor([model.processor.encode(longer)])

    def interrupt(*arguments):
        raise KeyboardInterrupt

    for place, generates in itertools.product((0, 2, 3), (False, True)):
        cache = cached(model, CONVERSATIONS[1])
        name = next(name for name, _ in model.backbone.named_modules() if name.endswith(f".{place}"))
        handle = model.backbone.get_submodule(name).register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            if generates:
                model.generate(ids, past_key_values=cache, **TWELVE)
            else:
                model.embed_query(longer, past_key_values=cache)
        handle.remove()
        assert_close(embedded(model, longer, past_key_values=cache), model.embed_query(longer))
        seen = model.generate(ids, past_key_values=cache, **TWELVE)
        assert torch.equal(seen, model.backbone.generate(ids, **TWELVE))


class Streamer(TextStreamer):
    """Keeps what it is given, and has enough after some of it."""

    def __init__(self, enough: int = 1000):
        self.seen, self.enough = [], enough

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value)
        if len(self.seen) > self.enough:
            raise InterruptedError

    def end(self) -> None:
        self.seen.append(None)


def test_a_streamer_sees_all_and_may_interrupt(model: NativeRetrievalModel):
    cache = cached(model, CONVERSATIONS[1])
    streamer = Streamer()
    wanted = model.generate(**of_cache(cache), streamer=streamer, **TWELVE)
    assert torch.equal(torch.cat([part.flatten() for part in streamer.seen[:-1]]), wanted[0])
    assert streamer.seen[-1] is None
    cache = cached(model, CONVERSATIONS[1])
    with pytest.raises(InterruptedError):
        model.generate(**of_cache(cache), streamer=Streamer(enough=4), **TWELVE)
    longer = torch.cat((wanted[:, :-6], torch.tensor([[7, 8, 9]])), dim=1)
    assert_close(embedded(model, longer, past_key_values=cache), model.embed_query(longer))
    ids = torch.tensor([model.processor.encode(CONVERSATIONS[1])])
    assert torch.equal(model.generate(ids, past_key_values=cache, **TWELVE), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_beams": 2, "num_beam_groups": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"assistant_early_exit": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"force_words_ids": [[5]]},
        {"cache_implementation": "static"},
        {"token_healing": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_ways_that_one_cache_cannot_follow_are_refused(tiny_model: NativeRetrievalModel, settings: dict):
    cache = cached(tiny_model, CONVERSATIONS[1])
    for arguments in (settings, {"generation_config": GenerationConfig(**settings)}):
        with pytest.raises(ValueError, match=list(settings)[0][:8]) as error:
            tiny_model.generate(**of_cache(cache), **arguments)
        assert_one_line(error)
    assert torch.equal(
        tiny_model.generate(**of_cache(cache), **TWELVE),
        tiny_model.backbone.generate(cache.input_ids[:, :80], **TWELVE),
    )  # and the cache is as good as before


def test_arguments_that_one_cache_cannot_follow_are_refused(tiny_model: NativeRetrievalModel):
    cache = cached(tiny_model, CONVERSATIONS[1])
    ids = cache.input_ids
    arguments = {
        "assistant_model": {"assistant_model": tiny_model.backbone},
        "custom_generate": {"custom_generate": "someone/else"},
        "inputs_embeds": {"inputs_embeds": torch.zeros(1, 3, 32)},
        "position_ids": {"position_ids": torch.arange(ids.shape[1])[None]},
    }
    for name, given in arguments.items():
        with pytest.raises(ValueError, match=name) as error:
            tiny_model.generate(ids, past_key_values=cache, **given)
        assert_one_line(error)
    bad = {"one row": ids[0], "a list": ids.tolist(), "nothing": None, "floats": ids.float(), "no tokens": ids[:, :0]}
    bad |= {"a negative token": -ids, "an unknown token": ids + 1000, "text": "Who?"}
    for name, value in bad.items():
        with pytest.raises(ValueError, match="input_ids") as error:
            tiny_model.generate(value, past_key_values=cache, **TWELVE)
        assert_one_line(error), name
    with pytest.raises(ValueError, match="attention_mask") as error:
        tiny_model.generate(ids, attention_mask=torch.ones(1, 3), past_key_values=cache, **TWELVE)
    assert_one_line(error)


@pytest.mark.parametrize("count", [1, 3])
def test_a_cache_of_another_number_of_conversations_is_refused(tiny_model: NativeRetrievalModel, count: int):
    cache = cached(tiny_model, CONVERSATIONS[:2])
    ids, mask = tiny_model.processor.pad(prompts_of(tiny_model)[:count])
    for call in (
        lambda: tiny_model.embed_query(CONVERSATIONS[:count], past_key_values=cache),
        lambda: tiny_model.generate(ids, attention_mask=mask, past_key_values=cache),
    ):
        with pytest.raises(ValueError, match=f"holds 2 conversations, and {count} ") as error:
            call()
        assert_one_line(error)


SETTINGS = [
    {"do_sample": True, "top_k": 3},
    {"do_sample": True, "temperature": 0.7},
    {"use_cache": False},
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 2},
    {"cache_implementation": "hybrid"},  # as Gemma's
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 4},
    {"suppress_tokens": [*range(100, 300)]},
    {"min_length": 200},
    {"max_length": 10},
    {"max_new_tokens": 2},
    {"stop_strings": ["a"]},
    {"forced_eos_token_id": 2},
    {"max_time": 1e-9},
    {"guidance_scale": 1.5},
    {"eos_token_id": [2, 5]},
    {"eos_token_id": None, "pad_token_id": None},
    {"pad_token_id": -1},
    {"return_dict_in_generate": True, "output_scores": True},
    {"sequence_bias": [[[5], 100.0]]},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"num_beams": 4},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_a_backbones_own_settings(make_model, settings: dict):
    """They shape its answers, with a cache as without, and never a written query."""
    model = make_model()
    ids = torch.tensor([model.processor.encode(CONVERSATIONS[1])])
    wanted = model.embed_query(CONVERSATIONS, mode="generated")
    for name, value in settings.items():
        setattr(model.backbone.generation_config, name, value)
    cache = cached(model, CONVERSATIONS[1], mode="generated")
    if "eos_token_id" not in settings:
        assert_close(model.embed_query(CONVERSATIONS, mode="generated"), wanted)
    arguments = {} if "max_length" in settings else {"max_new_tokens": 12}
    arguments |= {"tokenizer": model.tokenizer} if "stop_strings" in settings else {}
    if {"num_beams", "penalty_alpha"} & settings.keys():
        with pytest.raises(ValueError, match="num_beams|penalty_alpha") as error:
            model.generate(ids, past_key_values=cache, **arguments)
        assert_one_line(error)
        arguments |= {"num_beams": 1, "penalty_alpha": None}
    if "max_length" in settings:
        ids = ids[:, :4]
    outputs = []
    for given in ({}, {"past_key_values": cache}):
        torch.manual_seed(0)
        outputs.append(model.generate(ids, **given, **arguments))
    if "return_dict_in_generate" in settings:
        outputs = [output.sequences for output in outputs]
    assert torch.equal(*outputs)


def test_settings_are_the_callers_before_the_backbones(tiny_model: NativeRetrievalModel):
    tiny_model.backbone.generation_config.max_new_tokens = 3
    ids = torch.tensor([tiny_model.processor.encode(CONVERSATIONS[1])])
    config = GenerationConfig(max_new_tokens=5, eos_token_id=-1, return_dict_in_generate=True)
    before = config.to_dict()
    for arguments, length in (
        ({"eos_token_id": None}, 3),
        ({"generation_config": config}, 5),
        ({"generation_config": config, "return_dict_in_generate": False, "max_new_tokens": 7}, 7),
    ):
        output = tiny_model.generate(ids, past_key_values=cached(tiny_model, CONVERSATIONS[1]), **arguments)
        wanted = tiny_model.backbone.generate(ids, **arguments)
        assert type(output) is type(wanted)
        seen, wanted = (getattr(found, "sequences", found) for found in (output, wanted))
        assert torch.equal(seen, wanted) and seen.shape[1] == ids.shape[1] + length
    assert config.to_dict() == before
    # Positionally, and by transformers' own name for the ids.
    assert tiny_model.generate(ids, config).sequences.shape == (1, ids.shape[1] + 5)
    assert tiny_model.generate(inputs=ids, max_new_tokens=2).shape[1] <= ids.shape[1] + 2
    cache = cached(tiny_model, CONVERSATIONS[1])
    assert torch.equal(
        tiny_model.generate(inputs=ids, past_key_values=cache, **TWELVE), tiny_model.generate(ids, **TWELVE)
    )


# The paper's mode: a query is written first


def end_ids(model: NativeRetrievalModel) -> set[int]:
    tokenizer = model.tokenizer
    line_ends = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
    return line_ends | set(tokenizer.all_special_ids)


def test_generated_mode_reads_what_the_bare_backbone_would_write(model: NativeRetrievalModel):
    tokenizer, ends = model.tokenizer, end_ids(model)
    start = tokenizer(model.config.query_prompt, add_special_tokens=False)["input_ids"]
    compared = 0
    for conversation in CONVERSATIONS:
        ids = model.processor.encode(conversation) + start
        query: list[int] = []
        while len(query) < model.config.max_query_tokens:
            with torch.no_grad():
                token = int(model.backbone(torch.tensor([ids + query])).logits[0, -1].argmax())
            if token in ends:
                break
            query.append(token)
        if not query:
            continue
        compared += 1
        readout = torch.tensor([[False] * len(ids) + [True] * len(query)])
        wanted = model(torch.tensor([ids + query]), readout_mask=readout).query_embeddings
        assert_close(model.embed_query(conversation, mode="generated"), wanted)
        output = model.embed_query(conversation, mode="generated", return_cache=True)
        assert output.query_ids == [query]
    assert compared >= 3


def test_a_written_query_ends_before_a_line_end_or_special_token(tiny_model: NativeRetrievalModel):
    tokenizer = tiny_model.tokenizer
    words = tokenizer(" founder of the library in the town by the sea wall", add_special_tokens=False)["input_ids"]
    line_end = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    length = tiny_model.config.max_query_tokens
    assert len(words) > length
    written = [
        [*words[:2], line_end, words[2]],
        [*words[:3], tokenizer.eos_token_id],
        [*words[:1], tokenizer.convert_tokens_to_ids("<|im_start|>"), words[1]],
        words,
        [*words[:4], tokenizer.pad_token_id],
    ]
    wanted = [words[:2], words[:3], words[:1], words[:length], words[:4]]
    with scripted(tiny_model, written):
        output = tiny_model.embed_query(CONVERSATIONS, mode="generated", return_cache=True, return_attributions=True)
    assert output.query_ids == wanted
    assert output.attributions.shape == output.input_ids.shape
    for i, conversation in enumerate(CONVERSATIONS):
        with scripted(tiny_model, [written[i]]):
            alone = tiny_model.embed_query(conversation, mode="generated")
        assert_close(output.query_embeddings[i : i + 1], alone)
        ids = tiny_model.processor.encode(conversation)
        ids += tokenizer(tiny_model.config.query_prompt, add_special_tokens=False)["input_ids"]
        readout = torch.tensor([[False] * len(ids) + [True] * len(wanted[i])])
        assert_close(tiny_model(torch.tensor([ids + wanted[i]]), readout_mask=readout).query_embeddings, alone)


def test_a_backbone_that_writes_no_query_still_gives_a_vector(tiny_model: NativeRetrievalModel):
    ends = [[tiny_model.tokenizer.eos_token_id]] * len(CONVERSATIONS)
    with scripted(tiny_model, ends):
        output = tiny_model.embed_query(CONVERSATIONS, mode="generated", return_cache=True)
    assert all(output.query_ids)
    assert_close(output.query_embeddings.norm(dim=-1), torch.ones(len(CONVERSATIONS)))
