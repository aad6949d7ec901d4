"""The projection head, the copy path and the teacher's tokens that it reads, and novelty."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONVERSATIONS, SENTENCES, StubTeacher, assert_close, assistant, pad, prompts_of, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import modeling_native_retrieval
from configuration_native_retrieval import NativeRetrievalConfig
from modeling_native_retrieval import CopyPath, HistoryRepulsion, NativeRetrievalModel

# By itself: 8 dimensions of the teacher's, 16 of the backbone's, all gates open.
NOVELTY = HistoryRepulsion(
    NativeRetrievalConfig(text_config=LlamaConfig(hidden_size=16, num_attention_heads=4), head_dim=8)
)
with torch.no_grad():
    NOVELTY.log_ridge.fill_(-2.0)
    torch.nn.init.zeros_(NOVELTY.question_gate.weight)
    torch.nn.init.zeros_(NOVELTY.turn_gate.weight)
    NOVELTY.turn_gate.bias.fill_(10.0)


# The head on its own


def test_a_row_gives_the_same_vector_whatever_is_beside_it_and_around_it(
    make_model: Callable[..., NativeRetrievalModel],
):
    model = make_model()
    layers = len(model.config.hidden_state_layers)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 25), min_size=1, max_size=5), st.data())
    def check(lengths: list[int], data: st.DataObject):
        random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
        rows = [torch.randint(0, 400, (length,), generator=random) for length in lengths]
        states = [torch.randn(length, layers, 32, generator=random) for length in lengths]
        alone = [model(ids[None], hidden_states=s[None]).query_embeddings for ids, s in zip(rows, states, strict=True)]
        order = data.draw(st.permutations(range(len(rows))))
        width = max(lengths) + data.draw(st.integers(0, 3))
        ids = torch.randint(0, 400, (len(rows), width), generator=random)  # what stands in the padding
        padded = 9 * torch.randn(len(rows), width, layers, 32, generator=random)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(order):
            begin = data.draw(st.sampled_from([0, width - lengths[row]]))
            here = slice(begin, begin + lengths[row])
            ids[place, here], padded[place, here], mask[place, here] = rows[row], states[row], 1
        assert_close(model(ids, mask, hidden_states=padded).query_embeddings, torch.cat([alone[row] for row in order]))

    with torch.no_grad():
        check()


@pytest.mark.parametrize("length", [1, 3, 6])
@pytest.mark.parametrize("padding", [(0, 0), (2, 0), (0, 2)])
def test_the_newest_token_has_the_same_position_in_every_prompt(
    make_model: Callable[..., NativeRetrievalModel], length: int, padding: tuple[int, int]
):
    # Without an encoder, which would mix the tokens.
    head = make_model(head_num_layers=0, copy_num_heads=0, num_context_tokens=6).head
    before, after = padding
    states = torch.randn(1, before + length + after, head.linear_in.in_features // 32, 32)
    mask = torch.tensor([[False] * before + [True] * length + [False] * after])
    _, summary = head(states, mask)
    newest = summary[0, summary.shape[1] // 2 :]
    (gradient,) = torch.autograd.grad((newest * torch.linspace(-1, 2, len(newest))).sum(), head.positions.weight)
    assert gradient.abs().sum(1).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("padding", [(0, 0), (2, 0), (0, 2)])
def test_the_head_reads_the_last_tokens_and_knows_which_is_the_newest(
    make_model: Callable[..., NativeRetrievalModel], padding: tuple[int, int]
):
    length, width = 7, 3
    model = make_model(head_num_layers=0, copy_num_heads=0, num_context_tokens=width)
    half = model.head.skip.in_features // 2  # it reads the mean, and beside it the newest token
    before, after = padding
    ids = torch.tensor([[0] * before + list(range(10, 10 + length)) + [0] * after])
    mask = torch.tensor([[0] * before + [1] * length + [0] * after])
    states = torch.randn(*ids.shape, len(model.config.hidden_state_layers), 32)
    for read, wanted in ((slice(None, half), range(length - width, length)), (slice(half, None), [length - 1])):
        with torch.no_grad():
            for weight in (*model.head.linear_out.parameters(), *model.head.skip.parameters()):
                weight.zero_()
            model.head.skip.weight[:, read] = torch.randn(model.head.skip.out_features, half)
        vector = model(ids, mask, hidden_states=states).query_embeddings
        moved = []
        for place in range(length):
            changed = states.clone()
            changed[:, before + place] = torch.randn_like(changed[:, 0])
            if (model(ids, mask, hidden_states=changed).query_embeddings - vector).norm() > 1e-3:
                moved.append(place)
        assert moved == list(wanted)


def test_without_a_copy_path(make_model: Callable[..., NativeRetrievalModel]):
    model = make_model(copy_num_heads=0)
    assert not any("copy" in name for name, _ in model.named_parameters())
    output = model.embed_query(CONVERSATIONS, return_attributions=True)
    assert output.attributions is None
    assert_close(output.query_embeddings, model.embed_query(CONVERSATIONS, batch_size=1))


def test_a_plain_linear_head(make_model: Callable[..., NativeRetrievalModel]):
    model = make_model(head_num_layers=0, copy_num_heads=0, hidden_state_layers=[4])
    assert_close(model.embed_query(CONVERSATIONS), model.embed_query(CONVERSATIONS, batch_size=1))


# Copy path


def test_attributions(model: NativeRetrievalModel):
    rows = prompts_of(model)
    ids, mask = pad(rows, 0, "left"), pad([[1] * len(row) for row in rows], 0, "left")
    weights = model(ids, mask).attributions
    special = torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids))
    assert weights.shape == ids.shape
    assert (weights[(mask == 0) | special] == 0).all()
    assert (weights[(mask == 1) & ~special] != 0).float().mean() > 0.9
    output = model.embed_query(CONVERSATIONS, return_attributions=True)
    assert_close(output.attributions, weights)
    assert torch.equal(output.input_ids[output.attention_mask.bool()], ids[mask.bool()])


@pytest.mark.parametrize("padding", [0, 2])
def test_the_attention_sink_is_not_copied(tiny_model: NativeRetrievalModel, padding: int):
    # No special token: what stands first is a word, as with a tokenizer that has none.
    words = tiny_model.tokenizer("the old bridge", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[0] * padding + words])
    weights = tiny_model(ids, torch.tensor([[0] * padding + [1] * len(words)])).attributions[0, padding:]
    assert weights[0] == 0 and (weights[1:] != 0).all()


def test_the_copy_path_tells_turns_apart_from_the_newest(tiny_model: NativeRetrievalModel):
    """A bias towards the last user's turn finds it, however long the history."""
    with torch.no_grad():
        # Behind its words stand the two special tokens that end it and begin the assistant's.
        tiny_model.copy_path.segment_bias.weight[2] = 5.0
        tiny_model.copy_path.gain[tiny_model.copy_path.num_heads :] = 0.0  # which are for the turns before
        tiny_model.copy_path.novelty.turn_gate.bias.fill_(-10.0)  # which would turn away from some
    question = user("Who owned it?")
    for history in ([], CONVERSATIONS[1], [*CONVERSATIONS[1][1:], assistant("It is old."), *CONVERSATIONS[0]]):
        found = tiny_model.embed_query([*history, assistant("Well."), question], return_attributions=True)
        ids, weights = found.input_ids[0], found.attributions[0].abs()
        starts = (ids == tiny_model.tokenizer.bos_token_id).nonzero().flatten().tolist()
        assert weights[starts[-2] : starts[-1]].sum() > 0.99 * weights.sum() > 0


def related(path: CopyPath, ids, places, mask, segments) -> torch.Tensor:
    """Of each word's turn, by the definition, turn by turn: `(batch, words)`."""
    found = torch.zeros(ids.shape)
    for row in range(len(ids)):
        numbers = sorted(set(segments[row].tolist()))
        turns = {}
        for number in numbers:
            words = ids[row][mask[row] & (segments[row] == number)]
            turns[number] = ((path.BIAS_SCALE * path.token_salience(words)).exp() * path.token_values(words)).sum(0)
        blurred = [
            sum(path.TOPIC_DECAY ** abs(number - other) * turns[other] for other in numbers if other > 0)
            for number in range(max(numbers) + 1)
        ]
        for number in numbers:
            found[row, segments[row] == number] = F.cosine_similarity(blurred[number], blurred[0], dim=0)
    return found


def antecedents_of(path: CopyPath, normed, bias, mask, segments) -> torch.Tensor:
    """By the definition, word by word of the question: `(batch, words, heads)`."""
    module = path.antecedents
    found = torch.zeros(bias.shape)
    for row, head in itertools.product(range(len(bias)), range(path.num_heads)):
        numbers = segments[row].masked_fill(~mask[row], 0)
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
    model = tiny_model
    config, path = model.config, model.copy_path
    prefill = model.prefill(*model.pad(prompts_of(model)), use_cache=False)
    states = prefill.hidden_states[:, :, config.hidden_state_layers.index(config.copy_layer)]
    words = ids, places, mask, segments = model.words_of(prefill.input_ids, prefill.attention_mask)
    vectors, summary = torch.randn(len(ids), config.embedding_dim), torch.randn(len(ids), 2 * config.head_dim)
    with torch.no_grad():
        path.novelty.turn_gate.bias.fill_(-10.0)
        torch.nn.init.normal_(path.state_value.weight)
        torch.nn.init.normal_(path.antecedent_output.weight)
        path.antecedents.nothing.fill_(-0.1)
        path.topic_threshold.uniform_(0.8, 1.0)
        path.topic_slope.uniform_(0.1, 0.5)
        seen, weights = path(vectors, summary, states, *words)
        longer, _ = path(vectors, summary, 100 * torch.rand(places.max() + 1, 1).add(1) * states, *words)

        normed = F.rms_norm(states, states.shape[-1:], eps=1e-6)[torch.arange(len(ids))[:, None], places]
        queries = path.query(summary).view(len(ids), path.num_heads, -1)
        keys = torch.einsum("bth,ndh->btnd", normed, path.key)
        scores = torch.einsum("bnd,btnd->btn", queries, keys) / path.key.shape[1] ** 0.5
        bias = path.BIAS_SCALE * (path.token_salience(ids) + path.segment_bias(segments))
        bias -= path.BIAS_SCALE * path.topic_slope * F.relu(path.topic_threshold - related(path, *words)[..., None])
        wanted = (scores + bias).masked_fill(~mask[..., None], -torch.inf).softmax(1)
        antecedents = antecedents_of(path, normed, bias, mask, segments)
        vectors += path.state_value(torch.einsum("btn,bth->bnh", wanted, normed).flatten(1))
        values = torch.einsum("bth,nhd->btnd", normed, path.antecedent_value)
        vectors += path.antecedent_output(torch.einsum("btn,btnd->bnd", antecedents, values).flatten(1))
        wanted = torch.cat((wanted, antecedents), dim=-1)
        values = path.gain[:, None] * path.token_values(ids)[:, :, None]
        vectors += torch.einsum("btn,btnd->bd", wanted, values)
    assert_close(seen, vectors)
    assert_close(longer, vectors)
    assert_close(weights.gather(1, places) * mask, (wanted * path.gain).sum(-1))


def test_words_of_another_topic_are_left(tiny_model: NativeRetrievalModel):
    other = [user("Who founded the orchestra?"), assistant("Students founded the orchestra, and it plays marches.")]
    own = [
        user("Where is the old castle?"),
        assistant("The old castle is north of the village."),
        user("And who owned the castle?"),
    ]
    short, long = prompts_of(tiny_model, [own, other + own])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        tiny_model.copy_path.token_values.weight.normal_(generator=generator)
        tiny_model.copy_path.novelty.turn_gate.bias.fill_(-10.0)
        tiny_model.copy_path.topic_threshold.fill_(0.8)
        shares = []
        for slope in (0.0, 5.0):
            tiny_model.copy_path.topic_slope.fill_(slope)
            weights = tiny_model(*tiny_model.pad([long])).attributions[0]
            shares.append(weights[: -len(short)].sum().item() / weights.sum().item())
    assert shares[0] > 0.3
    assert shares[1] < 0.05


@pytest.mark.parametrize("tail", [[], [assistant("Let me look."), {"role": "tool", "content": "Nothing."}]])
def test_antecedents_stand_in_turns_before_the_question(tiny_model: NativeRetrievalModel, tail: list):
    path = tiny_model.copy_path
    with torch.no_grad():
        path.gain[: path.num_heads] = 0.0
        path.novelty.turn_gate.bias.fill_(-10.0)
    messages = CONVERSATIONS[1]
    history, whole, single = prompts_of(tiny_model, [messages[:-1], messages + tail, CONVERSATIONS[0]])
    weights = tiny_model(*tiny_model.pad([whole])).attributions[0]
    end = len(history) + 2  # with its end's token, and a line end
    assert 0 < weights[:end].sum() <= 0.5 + 1e-5
    assert not weights[end:].any()
    assert not tiny_model(*tiny_model.pad([single])).attributions.any()


TAILS = [
    [assistant("Let me look.")],
    [assistant("Let me look."), {"role": "tool", "content": "Nothing."}],
    [{"role": "tool", "content": "[]"}, assistant("Once more."), {"role": "tool", "content": "Maps."}, assistant("So")],
]


@pytest.mark.parametrize("tail", TAILS)
def test_what_an_agent_does_since_does_not_move_the_question(tiny_model: NativeRetrievalModel, tail: list[dict]):
    """To the copy path it stands where it stood, and so does all before it; in a batch with other rows as well."""
    messages = CONVERSATIONS[1]
    before, after = prompts_of(tiny_model, [messages, [*messages, *tail]])
    end = len(before) - before[::-1].index(tiny_model.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert after[:end] == before[:end]
    special = torch.tensor(tiny_model._special_ids)
    ids, mask = tiny_model.pad([before, after, *prompts_of(tiny_model)])
    segments = tiny_model._segments(ids, torch.isin(ids, special), mask.bool())
    before, after = (row[-len(ids) :].tolist() for row, ids in zip(segments, (before, after), strict=False))
    assert (
        before == sorted(before, reverse=True) and before[1] > before[end - 2] > before[-1]
    )  # counted from the newest
    assert after[:end] == before[:end]
    assert set(after[end + 1 :]) <= {0, 1} and after[-1] == 0


def test_under_autocast_the_copy_path_adds_up_in_full_precision(tiny_model: NativeRetrievalModel):
    """`--bf16 true` of the Trainer: the head's maps may round, and training goes on."""
    ids, mask = tiny_model.pad(prompts_of(tiny_model))
    wanted = tiny_model(ids, mask).query_embeddings
    tiny_model.train()
    with torch.autocast("cpu", torch.bfloat16):
        seen = tiny_model(ids, mask).query_embeddings
        assert seen.dtype == torch.float32
        (1 - seen[:, 0]).mean().backward()
    torch.testing.assert_close(seen, wanted, atol=2e-2, rtol=0)
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in tiny_model.parameters())


def test_padding_in_the_middle_does_not_hide_a_users_turn(tiny_model: NativeRetrievalModel):
    """A batch that goes on from a cache may have it anywhere, in the words that open a turn too."""
    prompt = tiny_model.build_prompt(CONVERSATIONS[1])
    special = torch.tensor(tiny_model._special_ids)
    opening = len(tiny_model._user_turn[0])
    assert opening > 1

    def segments(ids: list[int], mask: list[int]) -> list[int]:
        ids, real = torch.tensor([ids]), torch.tensor([mask]).bool()
        return tiny_model._segments(ids, torch.isin(ids, special) & real, real)[0][real[0]].tolist()

    wanted = segments(prompt, [1] * len(prompt))
    for place in range(1, len(prompt)):
        padded = [*prompt[:place], *[tiny_model.tokenizer.pad_token_id] * 3, *prompt[place:]]
        assert segments(padded, [1] * place + [0] * 3 + [1] * (len(prompt) - place)) == wanted


# The teacher's own tokens


class LowerCaseTeacher(StubTeacher):
    """A teacher that spells words otherwise than the backbone: in lower case, and in pieces of at most three letters."""

    def __init__(self):
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        letters = sorted({c for text in SENTENCES for c in text.lower() if not c.isspace()})
        pieces = sorted(
            {word[i : i + 3] for text in SENTENCES for word in text.lower().split() for i in range(len(word))}
        )
        vocabulary = dict.fromkeys(["[UNK]", *letters, *pieces, *(f"##{p}" for p in (*letters, *pieces))])
        tokenizer.model = models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="[UNK]")
        tokenizer.enable_truncation(4)
        super().__init__(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@pytest.fixture(scope="module")
def spelling_model(make_backbone, tiny_tokenizer: PreTrainedTokenizerFast) -> NativeRetrievalModel:
    """Its copy path reads in another tokenizer's tokens than the backbone."""
    fields = {"head_dim": 32, "head_num_attention_heads": 4, "copy_head_dim": 8}
    return NativeRetrievalModel.from_backbone(
        make_backbone("llama"), LowerCaseTeacher(), tokenizer=tiny_tokenizer, **fields
    )


@given(st.text(st.one_of(st.sampled_from("bridge Museum,é東🙂\n"), st.characters(codec="utf-8")), min_size=1))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_copy_path_reads_what_the_teacher_would(spelling_model: NativeRetrievalModel, text: str):
    """Every text in the teacher's tokens, each at the backbone's token in which it ends."""
    wanted = spelling_model.teacher_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    prompt = spelling_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[spelling_model.tokenizer.bos_token_id] * 2 + prompt])
    words, places, mask, segments = spelling_model.words_of(ids, torch.ones_like(ids))
    assert words[mask].tolist() == wanted["input_ids"]
    ends = np.cumsum([len(spelling_model._spellings[i]) for i in prompt])
    for place, (_, end) in zip(places[mask].tolist(), wanted["offset_mapping"], strict=True):
        byte = len(text[:end].encode())
        assert (ends[place - 3] if place > 2 else 0) < byte <= ends[place - 2]
    assert not segments[mask].any()


def test_the_teachers_tokens_do_not_reach_over_turns(spelling_model: NativeRetrievalModel):
    """Without a line end between them, as some templates have none."""
    tokenizer = spelling_model.tokenizer
    turns = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the brid", "ge was it")]
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, mask = spelling_model.pad([[start, start, *turns[0], end, *turns[1]], [start, start, *turns[1]]])
    words, places, mask, segments = spelling_model.words_of(ids, mask)
    wanted = spelling_model.encode_words(["the brid", "ge was it"])
    assert words[0][mask[0]].tolist() == wanted[0] + wanted[1] and words[1][mask[1]].tolist() == wanted[1]
    assert segments[0][mask[0]].tolist() == [1] * len(wanted[0]) + [0] * len(wanted[1])
    assert (segments.diff() <= 0).all() and (places.diff() >= 0).all()


def test_of_a_conversation_that_goes_on_only_new_turns_are_read(
    spelling_model: NativeRetrievalModel, monkeypatch: pytest.MonkeyPatch
):
    turns, read = [user("Who owned it?"), assistant("The museum.")], []
    original = modeling_native_retrieval._read_in
    monkeypatch.setattr(
        modeling_native_retrieval,
        "_read_in",
        lambda tokenizer, tokens: read.append(tokens) or original(tokenizer, tokens),
    )
    cache = spelling_model.embed_query(turns, return_cache=True).past_key_values
    first = len(read)
    more = [*turns, user("Since when was it the old bridge?")]
    output = spelling_model.embed_query(more, past_key_values=cache, return_cache=True)
    assert len(read) == first + 2 and b"Since" in b"".join(read[first])  # the question, and the header behind it
    assert_close(output.query_embeddings, spelling_model.embed_query(more))
    cache = output.past_key_values
    spelling_model.embed_query(turns[:1], past_key_values=cache)
    assert not any(b"museum" in b"".join(map(spelling_model._spellings.__getitem__, turn[1:])) for turn in cache.turns)


def test_a_word_is_the_same_however_the_backbone_spells_it(spelling_model: NativeRetrievalModel):
    ids = [torch.tensor(spelling_model.encode_words([text])) for text in ("the Library", "THE  library")]
    with torch.no_grad():
        vectors = [spelling_model(row, words_only=True).query_embeddings for row in ids]
    assert_close(*vectors)


def test_the_teachers_tokenizer_is_saved_and_loaded(spelling_model: NativeRetrievalModel, tmp_path: Path):
    spelling_model.save_pretrained(tmp_path)
    loaded = NativeRetrievalModel.from_pretrained(tmp_path)
    assert loaded.config.copy_vocab_size == len(spelling_model.teacher_tokenizer)
    long = "the bridge of the museum"  # a single turn has more than the four tokens that the teacher itself reads
    ids, mask = loaded.pad([loaded.build_prompt([{"role": "user", "content": long}])])
    words, _, copied, _ = loaded.words_of(ids, mask)
    whole = loaded.teacher_tokenizer(long, add_special_tokens=False)["input_ids"]
    assert len(whole) > 4 and str(whole)[1:-1] in str(words[copied].tolist())
    assert_close(loaded.embed_query(CONVERSATIONS), spelling_model.embed_query(CONVERSATIONS))
    assert (
        loaded.encode_words([long]) == spelling_model.encode_words([long]) and len(loaded.encode_words([long])[0]) > 4
    )
    (tmp_path / "teacher_tokenizer" / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(OSError, match="teacher_tokenizer"):
        NativeRetrievalModel.from_pretrained(tmp_path).embed_query(CONVERSATIONS)
    shutil.rmtree(tmp_path / "teacher_tokenizer")
    with pytest.raises(OSError, match="teacher_tokenizer"):
        NativeRetrievalModel.from_pretrained(tmp_path).embed_query(CONVERSATIONS)


# HistoryRepulsion: away from what has been said


def open_gates(model: NativeRetrievalModel, threshold: float = -1.0) -> None:
    with torch.no_grad():
        model.copy_path.novelty.turn_gate.bias.fill_(10.0)
        model.copy_path.novelty.threshold.fill_(threshold)


def test_attributions_are_what_the_vector_is_made_of(tiny_model: NativeRetrievalModel):
    """Untrained, a vector is the sum of its tokens' values, those that it is turned away from included."""
    open_gates(tiny_model)
    output = tiny_model.embed_query(CONVERSATIONS, return_attributions=True)
    values = tiny_model.copy_path.token_values(output.input_ids)
    wanted = torch.einsum("bt,btd->bd", output.attributions, values)
    assert (output.attributions < 0).any(1).tolist()[1]
    assert_close(output.query_embeddings, F.normalize(wanted, dim=-1))


def test_turns_are_told_apart(tiny_model: NativeRetrievalModel, monkeypatch: pytest.MonkeyPatch):
    """Each turn's words are those that `words` gives of it alone, whichever turns and rows stand beside it."""
    seen = []
    novelty = tiny_model.copy_path.novelty
    monkeypatch.setattr(
        novelty, "forward", lambda vectors, summary, words, states: (vectors, seen.append(words) or words[..., 0])
    )
    messages = CONVERSATIONS[1]
    tiny_model.embed_query([CONVERSATIONS[0], messages], return_attributions=True)
    for turn in messages:
        text = f"{turn['role']}\n{turn['content']}"
        ids = torch.tensor([tiny_model.tokenizer(text, add_special_tokens=False)["input_ids"]])
        wanted = F.normalize(tiny_model.copy_path.words(ids, torch.ones_like(ids).bool()), dim=-1)
        found = F.normalize(seen[0][1], dim=-1) @ wanted[0]
        assert found.max() > 0.999
    assert (seen[0][0].norm(dim=-1) > 0).sum() < (seen[0][1].norm(dim=-1) > 0).sum()


@given(st.integers(1, 6), st.floats(-1, 1), st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_a_vector_is_turned_away_from_turns_over_the_threshold(turns: int, threshold: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    novelty = NOVELTY
    with torch.no_grad():
        novelty.threshold.fill_(threshold)
    vector = F.normalize(torch.randn(1, 8, generator=generator), dim=-1)
    words = torch.randn(1, turns, 8, generator=generator)
    summary, states = torch.zeros(1, 2 * 8), torch.zeros(1, turns, 16)
    with torch.no_grad():
        turned, away = novelty(vector, summary, words, states)
        order = torch.randperm(turns, generator=generator)
        scale = torch.rand(1, turns, 1, generator=generator) + 0.5
        again, _ = novelty(vector, summary, (scale * words)[:, order], states)
        twice, _ = novelty(3 * vector, summary, words, states)
    before = (F.normalize(words, dim=-1) @ vector[0])[0]
    after = (F.normalize(words, dim=-1) @ turned[0])[0]
    if (before <= threshold).all():
        assert_close(turned, vector)
    if turns == 1:
        assert after[0] <= before[0] + 1e-6
    assert_close(again, turned)  # neither the order of the turns nor their length counts
    assert_close(twice, 3 * turned)
    assert_close(vector - turned, torch.einsum("bn,bnd->bd", away, words))


def test_a_turn_said_twice_is_not_taken_away_twice(tiny_model: NativeRetrievalModel):
    vector = F.normalize(torch.randn(1, 8), dim=-1)
    words = vector[:, None] + 0.5 * torch.randn(1, 1, 8)
    summary, states = torch.zeros(1, 16), torch.zeros(1, 1, 16)
    with torch.no_grad():
        NOVELTY.threshold.fill_(0.3)
        once, _ = NOVELTY(vector, summary, words, states)
        often, _ = NOVELTY(vector, summary, words.expand(-1, 9, -1), states.expand(-1, 9, -1))
    cosine = (F.normalize(words[:, 0], dim=-1) * once).sum()
    assert 0.3 - 0.1 < (F.normalize(words[:, 0], dim=-1) * often).sum() <= cosine + 1e-6
