"""Generation beside vectors: the backbone's own tokens, one cache for an agent's turns, and written queries."""

import itertools
from collections.abc import Callable
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
    pad,
    prompts_of,
    take_steps,
    user,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from modeling_native_retrieval import NativeRetrievalModel, QueryCache, _adapted_layers


def scripted(model: NativeRetrievalModel, rows: list[list[int]]):
    """A handle to make the backbone write these tokens, whatever it reads; a row is repeated from its last token."""
    steps = itertools.count()

    def rewrite(module: torch.nn.Module, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        step = next(steps)
        for i, row in enumerate(rows):
            logits[i, -1, row[min(step, len(row) - 1)]] = 1e4
        return logits

    return model.get_output_embeddings().register_forward_hook(rewrite)


# Generation


def continuations(
    backbone: PreTrainedModel | NativeRetrievalModel, rows: list[list[int]], **arguments: Any
) -> list[list[int]]:
    """Greedy continuations of one prompt and of all in one batch, and sampled ones of the batch."""
    found = []
    for batch, sample in ((rows[1:2], False), (rows, False), (rows, True)):
        torch.manual_seed(0)
        ids, mask = pad(batch, 0, "left"), pad([[1] * len(row) for row in batch], 0, "left")
        output = backbone.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=sample, pad_token_id=0, **arguments
        )
        found.append(output[:, ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize(("family", "tie"), BACKBONES)
def test_generation_is_the_backbones_own(
    family: str,
    tie: bool,
    make_backbone: Callable[..., PreTrainedModel],
    make_model: Callable[..., NativeRetrievalModel],
    tmp_path: Path,
):
    bare, model = make_backbone(family, tie), make_model(family, tie)
    rows = prompts_of(model)
    wanted = continuations(bare, rows)
    assert continuations(model, rows) == wanted
    before = model.embed_query(CONVERSATIONS)
    take_steps(model)
    trained = model.embed_query(CONVERSATIONS)
    assert (trained - before).norm() > 0.1
    assert continuations(model, rows) == wanted
    for name, weight in bare.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight), name
    model.save_pretrained(tmp_path)
    loaded = NativeRetrievalModel.from_pretrained(tmp_path)
    assert continuations(loaded, rows) == wanted
    for mode in MODES:
        assert_close(loaded.embed_query(CONVERSATIONS, mode=mode), model.embed_query(CONVERSATIONS, mode=mode))
    # As the bare backbone, it generates with a cache.
    assert loaded.backbone.config.use_cache and loaded.backbone.generation_config.use_cache


@pytest.mark.parametrize("mode", MODES)
def test_generation_goes_on_from_the_cache(model: NativeRetrievalModel, mode: str):
    for conversations in ([CONVERSATIONS[1]], CONVERSATIONS):
        output = model.embed_query(conversations, mode=mode, return_cache=True)
        rows = prompts_of(model, conversations)
        arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        ids, mask = pad(rows, 0, "left"), pad([[1] * len(row) for row in rows], 0, "left")
        wanted = model.generate(input_ids=ids, attention_mask=mask, **arguments)[:, ids.shape[1] :]
        seen = model.generate(
            input_ids=output.input_ids,
            attention_mask=output.attention_mask,
            past_key_values=output.past_key_values,
            **arguments,
        )
        assert torch.equal(seen[:, ids.shape[1] :], wanted)
        assert_close(output.query_embeddings, model.embed_query(conversations, mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_generation_goes_on_from_the_cache_behind_what_was_found(model: NativeRetrievalModel, mode: str):
    output = model.embed_query(CONVERSATIONS, mode=mode, return_cache=True)
    found = model.tokenizer("Tool result: the bridge was built in 1874.", return_tensors="pt")["input_ids"]
    ids = torch.cat((output.input_ids, found.expand(len(output.input_ids), -1)), dim=1)
    mask = torch.cat((output.attention_mask, torch.ones_like(found).expand(len(output.input_ids), -1)), dim=1)
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(input_ids=ids, attention_mask=mask, **arguments)
    seen = model.generate(input_ids=ids, attention_mask=mask, past_key_values=output.past_key_values, **arguments)
    assert torch.equal(seen, wanted)


def test_one_thread_may_embed_while_another_generates(tiny_model: NativeRetrievalModel):
    vectors = tiny_model.embed_query(CONVERSATIONS)
    written = tiny_model.embed_query(CONVERSATIONS, mode="generated")
    rows = prompts_of(tiny_model)
    answers = continuations(tiny_model, rows)

    def work(number: int) -> bool:
        if number % 3 == 0:
            return torch.allclose(tiny_model.embed_query(CONVERSATIONS), vectors, atol=1e-5)
        if number % 3 == 1:
            return torch.allclose(tiny_model.embed_query(CONVERSATIONS, mode="generated"), written, atol=1e-5)
        ids = torch.tensor(rows[1:2])
        return tiny_model.generate(ids, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :].tolist() == answers[0]

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(30)))


def test_a_padded_batch_generates_what_each_prompt_does_alone(tiny_model: NativeRetrievalModel):
    rows = prompts_of(tiny_model)
    ids, mask = tiny_model.pad(rows)
    arguments = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False, "pad_token_id": 0}
    together = tiny_model.generate(ids, attention_mask=mask, **arguments)[:, ids.shape[1] :]
    for row, seen in zip(rows, together, strict=True):
        assert torch.equal(tiny_model.generate(torch.tensor([row]), **arguments)[0, len(row) :], seen)


def test_as_a_plain_language_model_it_is_the_backbone_and_embeds_all_the_same(
    tiny_model: NativeRetrievalModel, tmp_path: Path
):
    tiny_model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "two")  # and whichever class has saved it, both load
    for again in (loaded, AutoModel.from_pretrained(tmp_path / "two", trust_remote_code=True)):
        for mode in MODES:
            assert_close(again.embed_query(CONVERSATIONS, mode=mode), tiny_model.embed_query(CONVERSATIONS, mode=mode))
    ids = torch.arange(3, 30)[None]
    assert torch.equal(loaded(ids).logits, tiny_model.backbone(ids).logits)
    assert loaded.can_generate()


# An agent's turn: one cache for the vector, the answer, and the next turn


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


GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("mode", ["context", "probe"])
def test_the_next_turn_passes_only_what_is_new(model: NativeRetrievalModel, mode: str):
    messages = [*CONVERSATIONS[1]]
    cache = model.embed_query(messages, mode=mode, return_cache=True).past_key_values
    for turn in range(3):
        ids = model.tokenizer(model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        ids = torch.tensor([ids["input_ids"] if turn else model.build_prompt(messages)])
        answer = model.generate(ids, past_key_values=cache, max_new_tokens=6, eos_token_id=None, **GREEDY)
        text = model.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip() or "Yes."
        messages += [assistant(text), user(f"And who came after number {turn}, and when was that?")]
        whole = len(model.build_prompt(messages))
        with tokens_passed(model) as counts:
            found = model.embed_query(messages, mode="context", past_key_values=cache, return_cache=True)
        assert sum(counts) <= whole - ids.shape[1] + 4, "the history passed again"
        cache = found.past_key_values
        assert_close(found.query_embeddings, model.embed_query(messages, mode="context"))
        assert_close(
            model.embed_query(messages, mode=mode, past_key_values=cache), model.embed_query(messages, mode=mode)
        )


@pytest.mark.parametrize("mode", ["context", "probe"])
def test_a_vector_in_the_middle_of_a_generation_changes_nothing(model: NativeRetrievalModel, mode: str):
    cache = model.embed_query(CONVERSATIONS, return_cache=True)
    ids, mask = cache.input_ids, cache.attention_mask
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, eos_token_id=None, **GREEDY)
    half = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache.past_key_values,
        max_new_tokens=5,
        eos_token_id=None,
        **GREEDY,
    )
    assert torch.equal(half, wanted[:, : half.shape[1]])
    with tokens_passed(model) as counts:
        vectors = model.embed_query(half, mode="context", past_key_values=cache.past_key_values)
    assert counts == [1], "more passed than the token that generate had left"
    longer = F.pad(mask, (0, 5), value=1)
    assert_close(vectors, model(half, longer).query_embeddings)
    other = model.embed_query(half, mode=mode, past_key_values=cache.past_key_values)
    rows = [row[keep.bool()].tolist() for row, keep in zip(half, longer, strict=True)]
    prefill = model.prefill(*model.pad(rows))
    assert_close(other, model.embed_prefilled(prefill, mode).query_embeddings)
    rest = model.generate(
        half,
        attention_mask=longer,
        past_key_values=cache.past_key_values,
        max_new_tokens=7,
        eos_token_id=None,
        **GREEDY,
    )
    assert torch.equal(rest, wanted)


def test_rows_of_a_batch_go_on_by_different_lengths(model: NativeRetrievalModel):
    cache = model.embed_query(CONVERSATIONS, return_cache=True).past_key_values
    longer = [
        [*messages, {"role": "tool", "content": "It was built in 1874 by a printer. " * (i % 3 + 1)}]
        for i, messages in enumerate(CONVERSATIONS)
    ]
    rows = prompts_of(model, longer)
    ids, mask = model.pad(rows)
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=None, **GREEDY)
    found = model.embed_query(longer, past_key_values=cache, return_cache=True)
    assert_close(found.query_embeddings, model.embed_query(longer))
    seen = model.generate(
        found.input_ids,
        attention_mask=found.attention_mask,
        past_key_values=found.past_key_values,
        max_new_tokens=8,
        eos_token_id=None,
        **GREEDY,
    )
    assert torch.equal(seen[:, found.input_ids.shape[1] :], wanted[:, ids.shape[1] :])
    # As a user would call it: with the batch padded in the usual way.
    found = model.embed_query(CONVERSATIONS, return_cache=True)
    seen = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=found.past_key_values,
        max_new_tokens=8,
        eos_token_id=None,
        **GREEDY,
    )
    assert torch.equal(seen, wanted)
    # In the middle of that turn: the rows stand as the caller has padded them, and not as the cache has.
    more = model.embed_query(seen, past_key_values=found.past_key_values)
    alone = [torch.tensor([[*row, *new.tolist()]]) for row, new in zip(rows, seen[:, ids.shape[1] :], strict=True)]
    assert_close(more, torch.cat([model.embed_query(row) for row in alone]))
    with pytest.raises(ValueError, match="num_return_sequences=2"):
        model.generate(ids[:1], past_key_values=found.past_key_values, num_return_sequences=2, do_sample=True)


def test_logits_behind_a_cache_are_those_of_an_uncached_run(model: NativeRetrievalModel):
    found = model.embed_query(CONVERSATIONS[1], return_cache=True)
    ids = torch.cat((found.input_ids, model.tokenizer(" It was built in 1874.", return_tensors="pt")["input_ids"]), 1)
    arguments = {"max_new_tokens": 6, "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True}
    seen = model.generate(ids, past_key_values=found.past_key_values, **arguments, **GREEDY)
    wanted = model.generate(ids, **arguments, **GREEDY)
    assert torch.equal(seen.sequences, wanted.sequences)
    assert torch.allclose(torch.stack(seen.logits), torch.stack(wanted.logits), atol=1e-4)


def test_an_edited_history_is_passed_anew_from_where_it_differs(model: NativeRetrievalModel):
    cache = model.embed_query(CONVERSATIONS[1], return_cache=True).past_key_values
    ids = torch.tensor([model.build_prompt(CONVERSATIONS[1])])
    model.generate(ids, past_key_values=cache, max_new_tokens=9, eos_token_id=None, **GREEDY)
    for place, text in ((2, "It was founded in 1901."), (1, "Tell me about the lighthouse."), (0, "Answer at length.")):
        edited = [dict(message) for message in CONVERSATIONS[1]]
        edited[place]["content"] = text
        found = model.embed_query(edited, past_key_values=cache, return_cache=True)
        assert_close(found.query_embeddings, model.embed_query(edited))
        cache = found.past_key_values


@pytest.mark.parametrize("mode", MODES)
def test_a_recurrent_backbone_goes_on_from_a_cache(make_model: Callable[..., NativeRetrievalModel], mode: str):
    """What its linear attention has taken in cannot be taken back: it may pass again, and all else is as it always is."""
    model = make_model("qwen3_5", num_context_tokens=2)
    messages = CONVERSATIONS[1][1:]
    found = model.embed_query(messages, mode=mode, return_cache=True)
    assert_close(found.query_embeddings, model.embed_query(messages, mode=mode))
    ids = found.input_ids
    wanted = model.generate(ids, max_new_tokens=4, eos_token_id=None, **GREEDY)
    seen = model.generate(ids, past_key_values=found.past_key_values, max_new_tokens=4, eos_token_id=None, **GREEDY)
    assert torch.equal(seen, wanted)
    for more in ([assistant("A printer."), user("Until when?")], [assistant("Nobody.")]):
        longer = [*messages, *more]
        seen = model.embed_query(longer, mode=mode, past_key_values=found.past_key_values, return_cache=True)
        assert_close(seen.query_embeddings, model.embed_query(longer, mode=mode))
        states = seen.past_key_values.recorded()[2]
        wanted = model.prefill(*model.pad([model.build_prompt(longer)])).hidden_states
        assert_close(states[:, -wanted.shape[1] :], wanted)


def test_a_query_that_is_written_is_not_in_the_prompts_cache(model: NativeRetrievalModel):
    found = model.embed_query(CONVERSATIONS[1], mode="generated", return_cache=True)
    cache = found.past_key_values
    assert cache.get_seq_length() == cache.recorded()[0].shape[1] == found.input_ids.shape[1]


def test_what_interrupts_a_pass_does_not_spoil_the_cache(model: NativeRetrievalModel):
    """A key is pressed, or memory ends, between two layers: some have taken the new tokens in, and some have not."""
    cache = model.embed_query(CONVERSATIONS[1], return_cache=True).past_key_values
    longer = [*CONVERSATIONS[1], assistant("A printer."), user("Until when did she own it?")]

    def interrupt(*arguments):
        raise KeyboardInterrupt

    handle = _adapted_layers(model.config, model.backbone)[-1][1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.embed_query(longer, past_key_values=cache)
    handle.remove()
    assert_close(model.embed_query(longer, past_key_values=cache), model.embed_query(longer))


def test_a_cache_that_is_cropped_forgets_what_it_has_recorded(model: NativeRetrievalModel):
    cache = model.embed_query(CONVERSATIONS[1], return_cache=True).past_key_values
    ids = torch.tensor([model.build_prompt(CONVERSATIONS[1])])
    answer = model.generate(ids, past_key_values=cache, max_new_tokens=5, eos_token_id=None, **GREEDY)
    cache.crop(-2)  # as transformers does with what it generated beyond an end
    assert cache.recorded()[0].shape[1] == cache.get_seq_length() == answer.shape[1] - 3
    assert_close(model.embed_query(answer, past_key_values=cache), model.embed_query(answer))


def test_a_window_that_could_not_be_cut_is_not_cut_later(make_model: Callable[..., NativeRetrievalModel]):
    model = make_model("gemma3")
    prompt = [*model.build_prompt(CONVERSATIONS[1]), *range(20, 50)]
    cache = QueryCache(model.config)
    model.prefill(torch.tensor([prompt]), past_key_values=cache)
    model.generate(torch.tensor([[*prompt[:-2], 3]]), past_key_values=cache, max_new_tokens=4, **GREEDY)
    for shared in (len(prompt) - SLIDING_WINDOW, len(prompt) - SLIDING_WINDOW - 3, 6, 4, 2):
        edited = torch.tensor([[*prompt[:shared], 3, 4, 5]])
        assert_close(model.embed_query(edited, past_key_values=cache), model.embed_query(edited))


def test_padding_is_known_without_a_mask(tiny_model: NativeRetrievalModel):
    found = tiny_model.embed_query(CONVERSATIONS, return_cache=True)
    arguments = {"max_new_tokens": 5, "eos_token_id": None}
    wanted = tiny_model.generate(found.input_ids, attention_mask=found.attention_mask, **arguments, **GREEDY)
    seen = tiny_model.generate(found.input_ids, past_key_values=found.past_key_values, **arguments, **GREEDY)
    assert torch.equal(seen, wanted)
    # Token ids as `generate` returned them, of rows that differ in length, with no cache at hand.
    rows = prompts_of(tiny_model)
    alone = torch.cat([tiny_model.embed_query(torch.tensor([row])) for row in rows])
    for pad_id in (tiny_model.tokenizer.pad_token_id, tiny_model.tokenizer.eos_token_id):
        tiny_model.backbone.generation_config.pad_token_id = pad_id
        assert_close(tiny_model.embed_query(tiny_model.pad(rows)[0]), alone)


def test_what_reads_a_conversation_anew_takes_no_cache(tiny_model: NativeRetrievalModel):
    found = tiny_model.embed_query(CONVERSATIONS[0], return_cache=True)
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens reads") as error:
        tiny_model.generate(found.input_ids, past_key_values=found.past_key_values, prompt_lookup_num_tokens=3)
    assert_one_line(error)


def test_a_cache_of_other_conversations_is_refused(tiny_model: NativeRetrievalModel):
    cache = tiny_model.embed_query(CONVERSATIONS[:2], return_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 2 conversations, and 1 ") as error:
        tiny_model.embed_query(CONVERSATIONS[0], past_key_values=cache)
    assert_one_line(error)
    with pytest.raises(ValueError, match="token ids must be"):
        tiny_model.embed_query(torch.zeros(2))


# The paper's mode: a query is written first


def end_ids(model: NativeRetrievalModel) -> set[int]:
    tokenizer = model.tokenizer
    line_ends = {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])}
    return line_ends | set(tokenizer.all_special_ids)


def test_generated_mode_reads_what_the_bare_backbone_would_write(
    model: NativeRetrievalModel,
):
    tokenizer, ends = model.tokenizer, end_ids(model)
    start = tokenizer(model.config.query_prompt, add_special_tokens=False)["input_ids"]
    compared = 0
    for conversation in CONVERSATIONS:
        ids = model.build_prompt(conversation) + start
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
        output = tiny_model.embed_query(CONVERSATIONS, mode="generated", return_cache=True)
    assert output.query_ids == wanted
    for i, conversation in enumerate(CONVERSATIONS):
        with scripted(tiny_model, [written[i]]):
            alone = tiny_model.embed_query(conversation, mode="generated")
        assert_close(output.query_embeddings[i : i + 1], alone)
        ids = tiny_model.build_prompt(conversation)
        ids += tokenizer(tiny_model.config.query_prompt, add_special_tokens=False)["input_ids"]
        readout = torch.tensor([[False] * len(ids) + [True] * len(wanted[i])])
        assert_close(tiny_model(torch.tensor([ids + wanted[i]]), readout_mask=readout).query_embeddings, alone)


def test_a_backbone_that_writes_no_query_still_gives_a_vector(tiny_model: NativeRetrievalModel):
    ends = [[tiny_model.tokenizer.eos_token_id]] * len(CONVERSATIONS)
    with scripted(tiny_model, ends):
        output = tiny_model.embed_query(CONVERSATIONS, mode="generated", return_cache=True)
    assert all(output.query_ids)
    assert_close(output.query_embeddings.norm(dim=-1), torch.ones(len(CONVERSATIONS)))
