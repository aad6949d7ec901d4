"""The head: tensors in, tensors out; the words that it chooses, the vectors of words, the projection beside them."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CONVERSATIONS,
    assert_close,
    assert_one_line,
    assistant,
    prompts_of,
    stir,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from head_native_retrieval import NativeRetrievalHead, Words
from messages_native_retrieval import last_question
from modeling_native_retrieval import NativeRetrievalModel

ENGINES = [
    user("Tell me about Ada Lovelace and her engines."),
    assistant("The Analytical Engine was designed by Babbage; Ada met Babbage in Málaga."),
    user("Who designed the engine first?"),
]


def words_of(model: NativeRetrievalModel, texts: list[str]) -> Words:
    """Of plain texts, padded on the left."""
    rows = model.processor.encode_words(texts)
    width = max(map(len, rows))
    ids = torch.tensor([[9] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    nowhere = torch.zeros_like(ids)
    return Words(ids, nowhere, mask, nowhere, nowhere)


def read(model: NativeRetrievalModel, conversations: list) -> tuple[torch.Tensor, torch.Tensor, Words]:
    """What the head gets of conversations."""
    ids, mask = model.processor.pad(prompts_of(model, conversations))
    return model.prefill(ids, mask, use_cache=False).hidden_states, mask, model.processor.read_words(ids, mask)


def added(model: NativeRetrievalModel, messages: list[dict], num_words: int = 99) -> list[str]:
    """The words that `extract_query` adds to the question."""
    question, text = last_question(messages), model.extract_query(messages, num_words=num_words)
    assert text.startswith(question)
    return text[len(question) :].split()


# The head on its own


@pytest.fixture(scope="module")
def head(make_model: Callable[..., NativeRetrievalModel]) -> NativeRetrievalHead:
    return stir(make_model(encoder_max_pieces=20)).query_head


@pytest.fixture(scope="module")
def reader(make_model: Callable[..., NativeRetrievalModel]) -> NativeRetrievalModel:
    """Reads words alone, without a projection head; not to be changed."""
    return make_model(head_num_layers=0)


def rows_of_tensors(lengths: list[int], seed: int, head: NativeRetrievalHead) -> list[tuple[torch.Tensor, Words]]:
    """Random states and words of prompts: as many words as tokens, fewer, and none; in the order of their turns."""
    random, rows = torch.Generator().manual_seed(seed), []
    for i, length in enumerate(lengths):
        count = (length, length // 2, 0)[(seed + i) % 3]
        positions = torch.randint(0, length, (count,), generator=random).sort().values
        turn_ids = torch.randint(0, 4, (count,), generator=random).sort(descending=True).values
        ids = torch.randint(0, 400, (count,), generator=random)
        groups = torch.randint(0, 12, (count,), generator=random)
        states = torch.randn(length, len(head.layers), 32, generator=random)
        rows.append((states, Words(ids, positions, torch.ones(count, dtype=torch.bool), turn_ids, groups)))
    return rows


def alone(head: NativeRetrievalHead, states: torch.Tensor, words: Words) -> tuple[torch.Tensor, torch.Tensor]:
    words = Words(*(F.pad(part, (0, not len(part)))[None] for part in words))  # at least one column, as of a processor
    return head(states[None], torch.ones(1, len(states)), words)


def test_a_row_gives_the_same_vector_whatever_is_beside_it_and_around_it(head: NativeRetrievalHead):
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 25), min_size=1, max_size=5), st.data())
    def check(lengths: list[int], data: st.DataObject):
        rows = rows_of_tensors(lengths, data.draw(st.integers(0, 2**16)), head)
        order = data.draw(st.permutations(range(len(rows))))
        width = max(lengths) + data.draw(st.integers(0, 3))
        states, mask = 9 * torch.randn(len(rows), width, len(head.layers), 32), torch.zeros(len(rows), width)
        count = max(1, *(len(words.ids) for _, words in rows)) + data.draw(st.integers(0, 2))
        fillers = (data.draw(st.integers(0, 399)), width - 1, 0, 0, 0)
        parts, begins = [], []
        for place, row in enumerate(order):
            own, words = rows[row]
            begins.append(begin := data.draw(st.sampled_from([0, width - len(own)])))
            states[place, begin : begin + len(own)], mask[place, begin : begin + len(own)] = own, 1
            words = words._replace(positions=words.positions + begin)
            parts.append([F.pad(p.long(), (0, count - len(p)), value=v) for p, v in zip(words, fillers, strict=True)])
        batch = Words(*map(torch.stack, zip(*parts, strict=True)))
        vectors, attributions = head(states, mask, batch._replace(mask=batch.mask.bool()))
        for place, row in enumerate(order):
            vector, attribution = alone(head, *rows[row])
            assert_close(vectors[place : place + 1], vector)
            begin, length = begins[place], lengths[row]
            assert_close(attributions[place : place + 1, begin : begin + length], attribution)
            outside = attributions[place].clone()
            outside[begin : begin + length] = 0
            assert not outside.any()

    with torch.no_grad():
        check()


def test_a_mask_may_be_of_any_type(head: NativeRetrievalHead):
    (states, words), *_ = rows_of_tensors([9], 0, head)
    batch = Words(*(part[None] for part in words))
    kinds = (torch.long, torch.bool, torch.int8)
    vectors = [head(states[None], torch.ones(1, 9, dtype=kind), batch)[0] for kind in kinds]
    assert all(torch.equal(vector, vectors[0]) for vector in vectors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_may_come_in_any_precision(head: NativeRetrievalHead, dtype: torch.dtype):
    """As those of a backbone in half precision, or a quantised one: the head's own precision counts."""
    (states, words), *_ = rows_of_tensors([9], 0, head)
    wanted, weights = alone(head, states.to(dtype).float(), words)
    seen, seen_weights = alone(head, states.to(dtype), words)
    assert seen.dtype == seen_weights.dtype == torch.float32
    assert_close(seen, wanted)
    assert_close(seen_weights, weights)


# WordSelection


def test_the_features_of_words(reader: NativeRetrievalModel):
    """By the definition: the attention to the tokens in which a word ends, and how new it is."""
    states, mask, words = read(reader, [CONVERSATIONS[2], [*ENGINES, ENGINES[1], user("Ada")]])
    selection = reader.query_head.selection
    with torch.no_grad():
        features, selectable = selection.features(states, mask, words)
        mass = selection.attention(states, mask, words)
    assert_close((features[..., :4].exp() - 1e-5).sum(1), torch.ones(2, 4))  # no token counts twice
    for row in range(2):
        for group in range(1, int(words.groups[row].max()) + 1):
            own = words.groups[row] == group
            turns, tokens = words.turn_ids[row][own].float(), words.positions[row][own].unique()
            wanted = torch.cat(
                (
                    (mass[row][:, tokens].sum(1) + 1e-5).log(),
                    -turns.min().log1p()[None],
                )
            )
            torch.testing.assert_close(features[row, group], wanted, atol=1e-4, rtol=0)
            assert selectable[row, group] == (not (turns == 1).any())
    assert not selectable[:, 0].any() and not selectable[0, int(words.groups[0].max()) + 1 :].any()


def test_words_are_added_once_in_order_as_they_are_spelt(reader: NativeRetrievalModel):
    """None of the question, be it a plural, and no function words."""
    wanted = ["Tell", "Ada", "Lovelace", "Analytical", "Babbage", "met", "Málaga"]
    assert added(reader, ENGINES) == wanted
    assert added(reader, ENGINES, 0) == []
    assert added(reader, [*ENGINES, assistant("Let me look."), {"role": "tool", "content": "A mill."}])[-1] == "mill"


def test_the_best_words_are_selected(reader: NativeRetrievalModel):
    messages = [
        user("Is zyzzogeton rarer than a mantis? I mean the zyzzogeton of Peru."),
        assistant("Yes."),
        user("Why?"),
    ]
    _, _, words = read(reader, [ENGINES, messages])
    head, pieces = reader.query_head, reader.processor.word_tokenizer
    scores = torch.full((2, int(words.groups.max()) + 1), -torch.inf)
    order = ["zyzzogeton", "peru", "mantis"]
    for place, word in enumerate(order):
        first = words.ids[1].tolist().index(pieces(word, add_special_tokens=False)["input_ids"][0])
        scores[1, words.groups[1, first]] = -place
    for count, wanted in ((1, "zyzzogeton"), (2, "zyzzogeton peru"), (9, "zyzzogeton mantis peru")):
        nothing, places = head.select(words, scores, count)
        assert nothing == []
        assert pieces.decode(words.ids[1, places]) == wanted
    assert places == sorted(places) and len(places) > 3  # of several pieces


def test_queries_as_text(reader: NativeRetrievalModel):
    """Alone, as text or as a list; in a batch; whoever spoke last."""
    texts = reader.extract_query(CONVERSATIONS)
    assert texts == [reader.extract_query(messages) for messages in CONVERSATIONS]
    assert reader.extract_query([CONVERSATIONS[1]]) == texts[1:2]
    assert reader.extract_query({"messages": CONVERSATIONS[1]}) == texts[1]
    cache = reader.prefill(*reader.processor.pad(prompts_of(reader)))
    assert reader.extract_prefilled(cache, CONVERSATIONS) == texts
    assert reader.extract_query("When?") == texts[3] == "When?"
    assert reader.extract_query(["When?", "Who?"]) == ["When?", "Who?"]
    assert texts[2].startswith("What does the museum show? ")
    assert len(added(reader, CONVERSATIONS[2], 3)) == 3 < len(added(reader, CONVERSATIONS[2]))
    assert reader.extract_query([assistant("Good morning, Ada.")]).startswith("Good morning, Ada.")


# Vectors of words


def test_a_vector_is_made_of_four_texts(reader: NativeRetrievalModel):
    said = "\n".join(message["content"] for message in ENGINES)
    texts = [ENGINES[-1]["content"], *(reader.extract_query(ENGINES, num_words=n) for n in (2, 6)), said]
    assert len(set(texts)) == 4
    parts = reader(words=words_of(reader, texts)).query_embeddings
    wanted = F.normalize(torch.tensor([0.5, 0.5, 1.0, 0.5]) @ parts, dim=-1)
    assert_close(reader.embed_query(ENGINES)[0], wanted)


def test_a_question_without_history_has_the_vector_of_its_words(make_model):
    model, text = stir(make_model(head_num_layers=0)), "Who built the old bridge, the bridge of Arnwick?"
    wanted = model.query_head.lexical(words_of(model, [text, "A longer text " * 9]))[:1]
    assert_close(model.embed_query(text), wanted)


def test_the_newest_words_count_where_there_are_too_many(make_model):
    model = make_model(head_num_layers=0, encoder_max_pieces=8)
    states, mask, words = read(model, [ENGINES])
    scores = model.query_head.selection(states, mask, words)
    question, few, more, newest = (rows[0] for rows in model.query_head.texts(words, scores))
    count = int(words.mask.sum())
    assert question == few[:4] == more[:4] == list(range(count - 4, count))
    assert few[4:] == model.query_head.select(words, scores, 2)[0][:4] and len(few) > 4
    assert len(more) == 8 and newest == list(range(count - 8, count))


def test_the_encoder_reads_words_in_order_and_none_of_the_padding(head: NativeRetrievalHead):
    def lexical(ids: list[list[int]], mask: list[list[int]]) -> torch.Tensor:
        ids, mask = torch.tensor(ids), torch.tensor(mask).bool()
        return head.lexical(Words(ids, torch.zeros_like(ids), mask, torch.zeros_like(ids), torch.zeros_like(ids)))

    vector = lexical([[5, 6, 7, 8]], [[1, 1, 1, 1]])
    assert_close(vector.norm(dim=-1), torch.ones(1))
    batch = lexical([[9, 9, 5, 6, 7, 8], [5, 6, 7, 8, 0, 3]], [[0, 0, 1, 1, 1, 1], [1] * 4 + [0] * 2])
    assert_close(batch, vector.expand(2, -1))
    assert (lexical([[8, 7, 6, 5]], [[1, 1, 1, 1]]) - vector).norm() > 1e-3
    long = list(range(5, 35))  # of which it reads the first
    assert_close(lexical([long], [[1] * 30]), lexical([long[:20]], [[1] * 20]))


def test_attributions_are_shares_of_words(model: NativeRetrievalModel):
    ids, mask = model.processor.pad(prompts_of(model))
    shares, words = model(ids, mask).attributions, model.processor.read_words(ids, mask)
    assert shares.shape == ids.shape and (shares >= 0).all()
    assert_close(shares.sum(1), torch.ones(len(ids)))
    for row, share in enumerate(shares):
        ends = words.positions[row][words.mask[row]]
        assert set(share.nonzero().flatten().tolist()) == set(ends.tolist())
    counts = words.mask[0].sum()  # of a question without history
    assert_close(shares[0][words.positions[0, :counts]], torch.full((int(counts),), 1 / counts))
    output = model.embed_query(CONVERSATIONS, return_attributions=True)
    assert_close(output.attributions, shares)
    assert torch.equal(output.input_ids, ids) and torch.equal(output.attention_mask, mask)
    assert output.past_key_values is None


@pytest.mark.parametrize("padding", [0, 2])
def test_the_attention_sink_is_no_word(reader: NativeRetrievalModel, padding: int):
    # No special token: what is first is a word, as with a tokenizer that has none.
    ids = reader.tokenizer("the old bridge", add_special_tokens=False)["input_ids"]
    mask = torch.tensor([[0] * padding + [1] * len(ids)])
    shares = reader(torch.tensor([[0] * padding + ids]), mask).attributions[0, padding:]
    assert shares[0] == 0 and shares[-1] > 0


@pytest.mark.parametrize("messages", [[user("🙂")], [*ENGINES[:2], user("🙂 ?")], [assistant("Hm.")], [user("the")]])
def test_a_prompt_with_few_words_or_none_has_a_vector(make_model, messages: list[dict]):
    model = stir(make_model())
    output = model.embed_query([messages], return_attributions=True)
    assert_close(output.query_embeddings.norm(dim=-1), torch.ones(1))
    assert output.attributions.sum().item() in (0, pytest.approx(1, abs=1e-5))
    assert model.extract_query(messages).startswith(messages[-1]["content"])
    assert_close(model.embed_prompts([[7]]).norm(dim=-1), torch.ones(1))


def test_under_autocast_training_goes_on(tiny_model: NativeRetrievalModel):
    """`--bf16 true` of the Trainer: maps may round, and vectors stay in full precision."""
    ids, mask = tiny_model.processor.pad(prompts_of(tiny_model))
    wanted = tiny_model(ids, mask).query_embeddings
    tiny_model.train()
    with torch.autocast("cpu", torch.bfloat16):
        seen = tiny_model(ids, mask).query_embeddings
        assert seen.dtype == torch.float32
        (1 - seen[:, 0]).mean().backward()
    torch.testing.assert_close(seen[[0, 3]], wanted[[0, 3]], atol=2e-2, rtol=0)  # without history
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in tiny_model.parameters())


# The projection head


def test_beside_words_the_projection_starts_at_zero(make_model):
    model = make_model()
    vectors = model.embed_query(CONVERSATIONS)
    model.query_head.projection = None
    assert torch.equal(model.embed_query(CONVERSATIONS), vectors)
    assert make_model(word_vocab_size=None).query_head.projection.linear_out.weight.any()


@pytest.mark.parametrize("padding", [(0, 0), (2, 0), (0, 2)])
@pytest.mark.parametrize("marked", [False, True])
def test_the_head_reads_the_last_tokens_or_those_marked(make_model, padding: tuple[int, int], marked: bool):
    """And it knows which is the newest of them: here its position drowns what it says."""
    length, width, (before, after) = 7, 3, padding
    head = make_model(word_vocab_size=None, num_context_tokens=width).query_head
    head.projection.encoder = torch.nn.ModuleList()  # which would mix the tokens
    with torch.no_grad():
        head.projection.positions.weight[0] = 1e4 * torch.randn(32)
    mask = torch.tensor([[0] * before + [1] * length + [0] * after])
    states = torch.randn(*mask.shape, len(head.layers), 32)
    read = [1, 2, 4, 5] if marked else [*range(length - width, length)]
    readout = torch.zeros_like(mask, dtype=torch.bool)
    readout[0, [before + place for place in read]] = True
    readout, moved = readout if marked else None, []
    vector, _ = head(states, mask, readout_mask=readout)
    for place in range(length):
        changed = states.clone()
        changed[:, before + place] = torch.randn_like(changed[:, 0])
        if (head(changed, mask, readout_mask=readout)[0] - vector).norm() > 1e-2:
            moved.append(place)
    assert moved == read[:-1]


def test_a_row_without_a_token_to_read_is_refused(head: NativeRetrievalHead):
    states, mask = torch.randn(2, 3, len(head.layers), 32), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="readout_mask") as error:
        head(states, mask, words=Words(*(torch.zeros(2, 1).long(),) * 5))
    assert_one_line(error)


def test_the_papers_head_reads_no_words(make_model: Callable[..., NativeRetrievalModel]):
    model = stir(make_model(word_vocab_size=None, hidden_state_layers=[4], selection_heads=None))
    assert {name.split(".")[1] for name, _ in model.query_head.named_parameters(prefix="head")} == {"projection"}
    output = model.embed_query(CONVERSATIONS, return_attributions=True)
    assert output.attributions is None
    assert_close(output.query_embeddings, model.embed_query(CONVERSATIONS, batch_size=1))
    words = Words(*(torch.ones(1, 2).long(),) * 5)
    for call in (lambda: model(words=words), lambda: model.extract_query("Who?")):
        with pytest.raises(ValueError, match="word_vocab_size=None") as error:
            call()
        assert_one_line(error)
