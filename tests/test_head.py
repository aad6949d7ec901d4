"""The head: tensors in, tensors out; the projection, the copy path with its antecedents, the repulsion from history."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import CONVERSATIONS, assert_close, assert_one_line, assistant, prompts_of, stir, user
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from configuration_native_retrieval import NativeRetrievalConfig
from head_native_retrieval import Antecedents, CopyPath, HistoryRepulsion, NativeRetrievalHead, Words
from modeling_native_retrieval import NativeRetrievalModel

# By itself: 8 dimensions of the teacher's, 16 of the backbone's, all gates open.
REPULSION = HistoryRepulsion(NativeRetrievalConfig(hidden_size=16, num_hidden_layers=4, head_dim=8))
with torch.no_grad():
    REPULSION.log_ridge.fill_(-2.0)
    torch.nn.init.zeros_(REPULSION.question_gate.weight)
    torch.nn.init.zeros_(REPULSION.turn_gate.weight)
    REPULSION.turn_gate.bias.fill_(10.0)


def close_gates(path: CopyPath) -> None:
    """Nothing is turned away from."""
    with torch.no_grad():
        path.repulsion.turn_gate.bias.fill_(-10.0)


def assert_similar(seen: torch.Tensor, wanted: torch.Tensor) -> None:
    """For weights, which may be larger than 1."""
    torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=1e-4)


# The head on its own


@pytest.fixture(scope="module")
def head(make_model: Callable[..., NativeRetrievalModel]) -> NativeRetrievalHead:
    return stir(make_model()).query_head


def rows_of_tensors(lengths: list[int], seed: int, head: NativeRetrievalHead) -> list[tuple[torch.Tensor, Words]]:
    """Random states and words of prompts: as many words as tokens, fewer, and none; in the order of their turns."""
    random, rows = torch.Generator().manual_seed(seed), []
    for i, length in enumerate(lengths):
        count = (length, length // 2, 0)[(seed + i) % 3]
        positions = torch.randint(0, length, (count,), generator=random).sort().values
        turn_ids = torch.randint(0, 40, (count,), generator=random).sort(descending=True).values  # beyond NUM_TURNS too
        ids = torch.randint(0, 400, (count,), generator=random)
        states = torch.randn(length, len(head.layers), 32, generator=random)
        rows.append((states, Words(ids, positions, torch.ones(count, dtype=torch.bool), turn_ids)))
    return rows


def alone(head: NativeRetrievalHead, states: torch.Tensor, words: Words) -> tuple[torch.Tensor, torch.Tensor]:
    words = Words(*(F.pad(part, (0, not len(part)))[None] for part in words))  # at least one column, as of a processor
    return head(states[None], torch.ones(1, len(states)), words)


def filled(parts: list[torch.Tensor], width: int, filler: int) -> torch.Tensor:
    return torch.stack([F.pad(part, (0, width - len(part)), value=filler) for part in parts])


def test_a_row_gives_the_same_vector_whatever_is_beside_it_and_around_it(head: NativeRetrievalHead):
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 25), min_size=1, max_size=5), st.data())
    def check(lengths: list[int], data: st.DataObject):
        rows = rows_of_tensors(lengths, data.draw(st.integers(0, 2**16)), head)
        order = data.draw(st.permutations(range(len(rows))))
        width = max(lengths) + data.draw(st.integers(0, 3))
        states, mask = 9 * torch.randn(len(rows), width, len(head.layers), 32), torch.zeros(len(rows), width)
        words, begins = [], []
        for place, row in enumerate(order):
            own, (ids, positions, real, turn_ids) = rows[row]
            begins.append(begin := data.draw(st.sampled_from([0, width - len(own)])))
            states[place, begin : begin + len(own)], mask[place, begin : begin + len(own)] = own, 1
            words.append((ids, positions + begin, real, turn_ids))
        count = max(1, *(len(ids) for ids, *_ in words)) + data.draw(st.integers(0, 2))
        fillers = (data.draw(st.integers(0, 399)), width - 1, False, 0)  # turn ids, too, are in order
        batch = Words(
            *(filled([row[i] for row in words], count, filler) for i, filler in enumerate(fillers[:2])),
            filled([row[2].long() for row in words], count, 0).bool(),
            filled([row[3] for row in words], count, 0),
        )
        vectors, attributions = head(states, mask, batch)
        for place, row in enumerate(order):
            vector, attribution = alone(head, *rows[row])
            assert_close(vectors[place : place + 1], vector)
            begin, length = begins[place], lengths[row]
            assert_similar(attributions[place : place + 1, begin : begin + length], attribution)
            outside = attributions[place].clone()
            outside[begin : begin + length] = 0
            assert not outside.any()

    with torch.no_grad():
        check()


@pytest.mark.parametrize("length", [1, 3, 6])
@pytest.mark.parametrize("padding", [(0, 0), (2, 0), (0, 2)])
def test_the_newest_token_has_the_same_position_in_every_prompt(make_model, length: int, padding: tuple[int, int]):
    # Without an encoder, which would mix the tokens.
    projection = make_model(head_num_layers=0, copy_num_heads=0, num_context_tokens=6).query_head.projection
    before, after = padding
    states = torch.randn(1, before + length + after, projection.linear_in.in_features // 32, 32)
    mask = torch.tensor([[False] * before + [True] * length + [False] * after])
    _, summary = projection(states, mask)
    newest = summary[0, summary.shape[1] // 2 :]
    weighted = (newest * torch.linspace(-1, 2, len(newest))).sum()
    (gradient,) = torch.autograd.grad(weighted, projection.positions.weight)
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("padding", [(0, 0), (2, 0), (0, 2)])
@pytest.mark.parametrize("marked", [False, True])
def test_the_head_reads_the_last_tokens_or_those_marked(make_model, padding: tuple[int, int], marked: bool):
    """And it knows which is the newest of them."""
    length, width = 7, 3
    head = make_model(head_num_layers=0, copy_num_heads=0, num_context_tokens=width).query_head
    projection = head.projection
    half = projection.skip.in_features // 2  # it reads the mean, and beside it the newest token
    before, after = padding
    mask = torch.tensor([[0] * before + [1] * length + [0] * after])
    states = torch.randn(*mask.shape, len(head.layers), 32)
    read = [1, 2, 4, 5] if marked else [*range(length - width, length)]
    readout = torch.zeros_like(mask, dtype=torch.bool)
    readout[0, [before + place for place in read]] = True
    readout = readout if marked else None
    for part, wanted in ((slice(None, half), read), (slice(half, None), read[-1:])):
        with torch.no_grad():
            for weight in (*projection.linear_out.parameters(), *projection.skip.parameters()):
                weight.zero_()
            projection.skip.weight[:, part] = torch.randn(projection.skip.out_features, half)
        vector, _ = head(states, mask, readout_mask=readout)
        moved = []
        for place in range(length):
            changed = states.clone()
            changed[:, before + place] = torch.randn_like(changed[:, 0])
            if (head(changed, mask, readout_mask=readout)[0] - vector).norm() > 1e-3:
                moved.append(place)
        assert moved == wanted


def test_a_mask_may_be_of_any_type(head: NativeRetrievalHead):
    (states, words), *_ = rows_of_tensors([9], 0, head)
    batch = states[None], Words(*(part[None] for part in words))
    vectors = [
        head(batch[0], torch.ones(1, 9, dtype=kind), batch[1])[0] for kind in (torch.long, torch.bool, torch.int8)
    ]
    assert all(torch.equal(vector, vectors[0]) for vector in vectors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_may_come_in_any_precision(head: NativeRetrievalHead, dtype: torch.dtype):
    """As those of a backbone in half precision, or a quantised one: the head's own precision counts."""
    (states, words), *_ = rows_of_tensors([9], 0, head)
    wanted, weights = alone(head, states.to(dtype).float(), words)
    seen, seen_weights = alone(head, states.to(dtype), words)
    assert seen.dtype == seen_weights.dtype == torch.float32
    assert_close(seen, wanted)
    assert_similar(seen_weights, weights)


def test_a_row_without_a_token_to_read_is_refused(head: NativeRetrievalHead):
    rows = torch.randn(2, 3, len(head.layers), 32), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match="readout_mask") as error:
        head(*rows, words=Words(*(torch.zeros(2, 1).long(),) * 4))
    assert_one_line(error)


def test_without_a_copy_path(make_model: Callable[..., NativeRetrievalModel]):
    model = stir(make_model(copy_num_heads=0))
    assert not any("copy" in name for name, _ in model.named_parameters())
    output = model.embed_query(CONVERSATIONS, return_attributions=True)
    assert output.attributions is None
    assert_close(output.query_embeddings, model.embed_query(CONVERSATIONS, batch_size=1))
    words = Words(*(torch.ones(1, 2).long(),) * 4)
    for call in (lambda: model(words=words), lambda: model.query_head.lexical(words)):
        with pytest.raises(ValueError, match="copy_num_heads=0") as error:
            call()
        assert_one_line(error)


@pytest.mark.parametrize("fields", [{"hidden_state_layers": [4]}, {"head_skip": False}, {"head_num_layers": 0}])
def test_smaller_heads(make_model: Callable[..., NativeRetrievalModel], fields: dict):
    for copies in (0, 2):
        model = stir(make_model(copy_num_heads=copies, **fields))
        assert_close(model.embed_query(CONVERSATIONS), model.embed_query(CONVERSATIONS, batch_size=2))


# Lexical vectors


def test_lexical_vectors_do_not_depend_on_order_or_padding(head: NativeRetrievalHead):
    def lexical(ids: list[list[int]], mask: list[list[int]]) -> torch.Tensor:
        ids, mask = torch.tensor(ids), torch.tensor(mask).bool()
        return head.lexical(Words(ids, torch.zeros_like(ids), mask, torch.zeros_like(ids)))

    vector = lexical([[5, 6, 7, 8]], [[1, 1, 1, 1]])
    assert_close(vector.norm(dim=-1), torch.ones(1))
    assert_close(lexical([[8, 7, 6, 5]], [[1, 1, 1, 1]]), vector)
    batch = lexical(
        [[9, 9, 5, 6, 7, 8], [5, 6, 7, 8, 0, 3], [4, 0, 0, 0, 0, 0]],
        [[0, 0, 1, 1, 1, 1], [1] * 4 + [0] * 2, [1] + [0] * 5],
    )
    assert_close(batch[:2], vector.expand(2, -1))
    values = head.copy_path.token_values.weight
    assert_close(batch[2], F.normalize(values[4], dim=-1))


def test_lexical_vectors_weigh_words_by_salience(head: NativeRetrievalHead):
    path = head.copy_path
    ids = torch.tensor([[5, 6, 7]])
    words = Words(ids, torch.zeros_like(ids), torch.ones_like(ids).bool(), torch.zeros_like(ids))
    weights = (path.BIAS_SCALE * path.token_salience.weight[ids[0], 0]).softmax(0)
    assert_close(head.lexical(words)[0], F.normalize(weights @ path.token_values.weight[ids[0]], dim=-1))
    head.lexical(words)[0, 0].backward()
    for parameter in (path.token_values.weight, path.token_salience.weight):
        assert parameter.grad.abs().sum(1).nonzero().flatten().tolist() == [5, 6, 7]
    head.zero_grad()


# Copy path


def test_attributions(model: NativeRetrievalModel):
    ids, mask = model.processor.pad(prompts_of(model))
    weights = model(ids, mask).attributions
    special = torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids))
    assert weights.shape == ids.shape
    assert (weights[(mask == 0) | special] == 0).all()
    assert (weights[(mask == 1) & ~special] != 0).float().mean() > 0.9
    output = model.embed_query(CONVERSATIONS, return_attributions=True)
    assert_similar(output.attributions, weights)
    assert torch.equal(output.input_ids, ids) and torch.equal(output.attention_mask, mask)
    assert output.past_key_values is None


def test_attributions_are_what_the_vector_is_made_of(tiny_model: NativeRetrievalModel):
    """Untrained, a vector is the sum of its tokens' values, those that it is turned away from included."""
    repulsion = tiny_model.query_head.copy_path.repulsion
    with torch.no_grad():
        repulsion.turn_gate.bias.fill_(10.0)
        repulsion.threshold.fill_(-1.0)
    output = tiny_model.embed_query(CONVERSATIONS, return_attributions=True)
    values = tiny_model.query_head.copy_path.token_values(output.input_ids)
    wanted = torch.einsum("bt,btd->bd", output.attributions, values)
    assert (output.attributions < 0).any(1).tolist()[1]
    assert_close(output.query_embeddings, F.normalize(wanted, dim=-1))


@pytest.mark.parametrize("padding", [0, 2])
def test_the_attention_sink_is_not_copied(tiny_model: NativeRetrievalModel, padding: int):
    # No special token: what is first is a word, as with a tokenizer that has none.
    words = tiny_model.tokenizer("the old bridge", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[0] * padding + words])
    weights = tiny_model(ids, torch.tensor([[0] * padding + [1] * len(words)])).attributions[0, padding:]
    assert weights[0] == 0 and (weights[1:] != 0).all()


def test_the_copy_path_tells_turns_apart_from_the_newest(tiny_model: NativeRetrievalModel):
    """A bias towards the user's last turn finds it, however long the history."""
    path = tiny_model.query_head.copy_path
    close_gates(path)
    with torch.no_grad():
        path.turn_bias.weight[1] = 5.0
        path.gain[path.num_heads :] = 0.0  # which are for the turns before
    question = user("Who owned it?")
    for history in ([], CONVERSATIONS[1], [*CONVERSATIONS[1][1:], assistant("It is old."), *CONVERSATIONS[0]]):
        found = tiny_model.embed_query([*history, assistant("Well."), question], return_attributions=True)
        ids, weights = found.input_ids[0], found.attributions[0].abs()
        starts = (ids == tiny_model.tokenizer.bos_token_id).nonzero().flatten().tolist()
        assert weights[starts[-2] : starts[-1]].sum() > 0.99 * weights.sum() > 0


def related(path: CopyPath, words: Words) -> torch.Tensor:
    """Of each word's turn to the last question, by the definition, turn by turn: `(batch, words)`."""
    found = torch.zeros(words.ids.shape)
    last = words.turn_ids.max()
    for row in range(len(words.ids)):
        turns = {}
        for number in range(1, last + 1):  # 0 is what an agent has said and called since
            ids = words.ids[row][words.mask[row] & (words.turn_ids[row] == number)]
            turns[number] = ((path.BIAS_SCALE * path.token_salience(ids)).exp() * path.token_values(ids)).sum(0)
        blurred = [
            sum(path.TOPIC_DECAY ** abs(number - other) * turns[other] for other in turns) for number in range(last + 1)
        ]
        for number in range(last + 1):
            of_turn = words.turn_ids[row] == number
            found[row, of_turn] = F.cosine_similarity(blurred[number], blurred[0], dim=0)
    return found


def antecedents_of(path: CopyPath, normed: torch.Tensor, bias: torch.Tensor, words: Words) -> torch.Tensor:
    """By the definition, word by word of the question: `(batch, words, heads)`."""
    module: Antecedents = path.antecedents
    found = torch.zeros(bias.shape)
    for row, head in itertools.product(range(len(bias)), range(path.num_heads)):
        numbers = words.turn_ids[row].masked_fill(~words.mask[row], 0)
        last = numbers[numbers > 0].min()
        earlier = numbers > last
        asking = (numbers == last).nonzero().flatten()[-module.NUM_WORDS :]
        shares = module.share(normed[row, asking])[:, head].softmax(0)
        for share, word in zip(shares, asking, strict=True):
            query = module.query(normed[row, word]).view(path.num_heads, -1)[head]
            scores = normed[row, earlier] @ (query @ module.key[head]) / len(query) ** 0.5 + bias[row, earlier, head]
            scores = torch.cat((scores, path.BIAS_SCALE * module.nothing[head : head + 1]))
            found[row, earlier, head] += share * scores.softmax(0)[:-1]
    return found


def test_the_copy_path_is_attention_over_normed_states(tiny_model: NativeRetrievalModel):
    """It forms neither norms nor keys nor values for each token, and gives what it would give if it did."""
    model = stir(tiny_model)
    config, path = model.config, model.query_head.copy_path
    close_gates(path)
    prefill = model.prefill(*model.processor.pad(prompts_of(model)), use_cache=False)
    states = prefill.hidden_states[:, :, model.query_head.copy_state]
    words = model.processor.read_words(prefill.input_ids, prefill.attention_mask)
    vectors, summary = torch.randn(len(states), config.embedding_dim), torch.randn(len(states), 2 * config.head_dim)
    with torch.no_grad():
        path.antecedents.nothing.fill_(-0.1)
        path.topic_threshold.uniform_(0.8, 1.0)
        path.topic_slope.uniform_(0.1, 0.5)
        seen, weights = path(vectors, summary, states, words)
        scales = 100 * torch.rand(states.shape[1], 1).add(1)
        longer, _ = path(vectors, summary, scales * states, words)

        rows = torch.arange(len(states))[:, None]
        normed = F.rms_norm(states, states.shape[-1:], eps=1e-6)[rows, words.positions]
        queries = path.query(summary).view(len(states), path.num_heads, -1)
        keys = torch.einsum("bth,ndh->btnd", normed, path.key)
        scores = torch.einsum("bnd,btnd->btn", queries, keys) / path.key.shape[1] ** 0.5
        bias = path.BIAS_SCALE * (path.token_salience(words.ids) + path.turn_bias(words.turn_ids))
        bias -= path.BIAS_SCALE * path.topic_slope * F.relu(path.topic_threshold - related(path, words)[..., None])
        wanted = (scores + bias).masked_fill(~words.mask[..., None], -torch.inf).softmax(1)
        antecedents = antecedents_of(path, normed, bias, words)
        vectors += path.state_value(torch.einsum("btn,bth->bnh", wanted, normed).flatten(1))
        values = torch.einsum("bth,nhd->btnd", normed, path.antecedent_value)
        vectors += path.antecedent_output(torch.einsum("btn,btnd->bnd", antecedents, values).flatten(1))
        wanted = torch.cat((wanted, antecedents), dim=-1)
        values = path.gain[:, None] * path.token_values(words.ids)[:, :, None]
        vectors += torch.einsum("btn,btnd->bd", wanted, values)
    torch.testing.assert_close(seen, vectors, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(longer, vectors, atol=1e-4, rtol=1e-4)
    given = torch.zeros(states.shape[:2]).scatter_add(1, words.positions, (wanted * path.gain).sum(-1) * words.mask)
    assert_close(weights, given)


def test_words_of_another_topic_are_left(tiny_model: NativeRetrievalModel):
    other = [user("Who founded the orchestra?"), assistant("Students founded the orchestra, and it plays marches.")]
    own = [
        user("Where is the old castle?"),
        assistant("The old castle is north of the village."),
        user("And who owned the castle?"),
    ]
    short, long = prompts_of(tiny_model, [own, other + own])
    path = tiny_model.query_head.copy_path
    close_gates(path)
    with torch.no_grad():
        path.token_values.weight.normal_(generator=torch.Generator().manual_seed(0))
        path.topic_threshold.fill_(0.8)
        shares = []
        for slope in (0.0, 5.0):
            path.topic_slope.fill_(slope)
            weights = tiny_model(*tiny_model.processor.pad([long])).attributions[0]
            shares.append(weights[: -len(short)].sum().item() / weights.sum().item())
    assert shares[0] > 0.3
    assert shares[1] < 0.05


@pytest.mark.parametrize("tail", [[], [assistant("Let me look."), {"role": "tool", "content": "Nothing."}]])
def test_antecedents_are_in_turns_before_the_question(tiny_model: NativeRetrievalModel, tail: list):
    path = tiny_model.query_head.copy_path
    close_gates(path)
    with torch.no_grad():
        path.gain[: path.num_heads] = 0.0
    messages = CONVERSATIONS[1]
    history, whole, single = prompts_of(tiny_model, [messages[:-1], messages + tail, CONVERSATIONS[0]])
    weights = tiny_model(*tiny_model.processor.pad([whole])).attributions[0]
    end = len(history) + 2  # with its end's token, and a line end
    assert 0 < weights[:end].sum() <= 0.5 + 1e-5
    assert not weights[end:].any()
    assert not tiny_model(*tiny_model.processor.pad([single])).attributions.any()


def test_under_autocast_the_copy_path_adds_up_in_full_precision(tiny_model: NativeRetrievalModel):
    """`--bf16 true` of the Trainer: the head's maps may round, and training goes on."""
    ids, mask = tiny_model.processor.pad(prompts_of(tiny_model))
    wanted = tiny_model(ids, mask).query_embeddings
    tiny_model.train()
    with torch.autocast("cpu", torch.bfloat16):
        seen = tiny_model(ids, mask).query_embeddings
        assert seen.dtype == torch.float32
        (1 - seen[:, 0]).mean().backward()
    torch.testing.assert_close(seen, wanted, atol=2e-2, rtol=0)
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in tiny_model.parameters())


# HistoryRepulsion: away from what has been said


def test_turns_are_told_apart(
    tiny_model: NativeRetrievalModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    """Each turn's words are those that it has alone, whichever turns and rows are beside it."""
    seen, head = [], tiny_model.query_head
    monkeypatch.setattr(
        head.copy_path.repulsion,
        "forward",
        lambda vectors, summary, words, states: (vectors, seen.append(words) or words[..., 0]),
    )
    messages = CONVERSATIONS[1]
    tiny_model.embed_query([CONVERSATIONS[0], messages], return_attributions=True)
    for turn in messages:
        text = f"{turn['role']}\n{turn['content']}"
        ids = torch.tensor([tiny_tokenizer(text, add_special_tokens=False)["input_ids"]])
        words = Words(ids, torch.zeros_like(ids), torch.ones_like(ids).bool(), torch.zeros_like(ids))
        found = F.normalize(seen[0][1], dim=-1) @ head.lexical(words)[0]
        assert found.max() > 0.999
    assert (seen[0][0].norm(dim=-1) > 0).sum() < (seen[0][1].norm(dim=-1) > 0).sum()


@given(st.integers(1, 6), st.floats(-1, 1), st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_a_vector_is_turned_away_from_turns_over_the_threshold(turns: int, threshold: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        REPULSION.threshold.fill_(threshold)
    vector = F.normalize(torch.randn(1, 8, generator=generator), dim=-1)
    words = torch.randn(1, turns, 8, generator=generator)
    summary, states = torch.zeros(1, 2 * 8), torch.zeros(1, turns, 16)
    with torch.no_grad():
        turned, away = REPULSION(vector, summary, words, states)
        order = torch.randperm(turns, generator=generator)
        scale = torch.rand(1, turns, 1, generator=generator) + 0.5
        again, _ = REPULSION(vector, summary, (scale * words)[:, order], states)
        twice, _ = REPULSION(3 * vector, summary, words, states)
        absent, _ = REPULSION(vector, summary, torch.cat((0 * words, words), 1), torch.cat((states, states), 1))
    before = (F.normalize(words, dim=-1) @ vector[0])[0]
    after = (F.normalize(words, dim=-1) @ turned[0])[0]
    if (before <= threshold).all():
        assert_close(turned, vector)
    if turns == 1:
        assert after[0] <= before[0] + 1e-6
    assert_close(again, turned)  # neither the order of the turns nor their length counts
    assert_close(twice, 3 * turned)
    assert_close(absent, turned)  # nor a turn that is not there
    assert_close(vector - turned, torch.einsum("bn,bnd->bd", away, words))


def test_a_turn_said_twice_is_not_taken_away_twice():
    vector = F.normalize(torch.randn(1, 8), dim=-1)
    words = vector[:, None] + 0.5 * torch.randn(1, 1, 8)
    summary, states = torch.zeros(1, 16), torch.zeros(1, 1, 16)
    with torch.no_grad():
        REPULSION.threshold.fill_(0.3)
        once, _ = REPULSION(vector, summary, words, states)
        often, _ = REPULSION(vector, summary, words.expand(-1, 9, -1), states.expand(-1, 9, -1))
    cosine = (F.normalize(words[:, 0], dim=-1) * once).sum()
    assert 0.3 - 0.1 < (F.normalize(words[:, 0], dim=-1) * often).sum() <= cosine + 1e-6
