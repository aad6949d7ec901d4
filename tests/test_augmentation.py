"""native_retrieval/augmentation.py: whatever is put around a conversation, its question stays."""

import random

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_native_retrieval import check_messages
from native_retrieval.augmentation import vary, with_other_topics, with_typos
from train import varied, with_topic_shifts

texts = st.text(st.characters(categories=["L", "Nd", "P", "Zs"]), min_size=1, max_size=60).filter(str.strip)


@st.composite
def conversations(draw):
    """User and assistant in turns, the last one the user's."""
    turns = draw(st.lists(texts, min_size=1, max_size=7).filter(lambda turns: len(turns) % 2))
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


@settings(max_examples=200, deadline=None)
@given(conversations(), st.integers(0, 10**6))
def test_a_varied_conversation_is_one_and_keeps_its_turns_in_order(messages, seed):
    before = [dict(message) for message in messages]
    varied = vary(messages, ["A passage."], random.Random(seed))
    check_messages(varied)
    assert messages == before, "the original was changed"
    kept = iter(message["content"] for message in varied)
    # All turns are there but the last question, which may have typos: the same letters in another order.
    assert all(any(message["content"] == content for content in kept) for message in messages[:-1])
    letters = sorted("".join(messages[-1]["content"].split()))
    assert any(sorted("".join(message["content"].split())) == letters for message in varied)
    assert varied == vary(messages, ["A passage."], random.Random(seed)), "the seed does not fix it"


def test_every_kind_of_variety_occurs():
    messages = [
        {"role": "user", "content": "Who painted Guernica?"},
        {"role": "assistant", "content": "Picasso."},
        {"role": "user", "content": "Where was he born and raised?"},
    ]
    rng = random.Random(0)
    varied = [vary(messages, ["A passage."], rng) for _ in range(200)]
    assert {m[0]["role"] for m in varied} == {"system", "user"}
    assert {m[-1]["role"] for m in varied} == {"user", "assistant", "tool"}
    assert any('"type": "function"' in m[0]["content"] for m in varied)
    assert any(message["role"] == "tool" for m in varied for message in m[:-1])
    assert any(messages[-1]["content"] not in [message["content"] for message in m] for m in varied)


def test_a_rewrite_takes_the_place_of_some_last_questions():
    messages = [{"role": "user", "content": "Hello"}, {"role": "user", "content": "his?"}]
    rng = random.Random(0)
    varied = [vary(messages, [], rng, "Picasso's?") for _ in range(200)]
    replaced = [any(message["content"] == "Picasso's?" for message in m) for m in varied]
    assert 20 < sum(replaced) < 80
    assert all(any(message["content"] == "his?" for message in m) != r for m, r in zip(varied, replaced, strict=True))


def test_other_topics_are_of_other_conversations_and_serve_all_queries_of_one():
    things = [f"thing {i}" for i in range(30)]
    rows = []
    for thing in things:
        first = [{"role": "user", "content": f"What is {thing}?"}]
        then = [
            *first,
            {"role": "assistant", "content": f"{thing}: made of sand."},
            {"role": "user", "content": "Why?"},
        ]
        rows += [{"conv": thing, "messages": messages} for messages in (first, then)]
    queries = Dataset.from_list(rows)
    some, seen = with_topic_shifts(queries, 0.5)
    assert len(set(some["conv"])) == 15 and len(some) == len(seen) == 30
    counts = set()
    for (thing, messages), (_, later), before, after in zip(
        *(list(zip(some["conv"], some["messages"], strict=True))[i::2] for i in (0, 1)),
        seen[::2],
        seen[1::2],
        strict=True,
    ):
        assert before[-1:] == messages and after[-3:] == later
        assert after[: len(before)] == before, "not behind the same turns: a pass for each"
        others = before[:-1]
        counts.add(sum(message["role"] == "user" for message in others))
        assert not any(message["content"].startswith((f"What is {thing}?", f"{thing}:")) for message in others)
    assert min(counts) >= 1 and max(counts) <= 20 and len(counts) > 3
    assert with_topic_shifts(queries, 0.5)[1] == seen
    assert with_topic_shifts(queries, 0.5, draw=1)[1] != seen
    assert with_topic_shifts(queries, 0)[1] == []
    alone = queries.filter(lambda row: row["conv"] == things[0])
    assert with_topic_shifts(alone, 1.0)[1] == alone["messages"][:], "no others to be had"


def test_a_varied_conversation_for_which_there_is_no_room_stays_as_it_is():
    def build_prompt(messages):
        if messages[0]["role"] == "system":
            raise ValueError("too long")

    queries = Dataset.from_list([{"messages": [{"role": "user", "content": "What is glass?"}], "rewrite": ""}] * 50)
    some, seen = varied(queries, 1.0, None, build_prompt)
    assert all(messages[0]["role"] == "user" for messages in seen)
    assert any(messages != own for messages, own in zip(seen, some["messages"], strict=True))


def test_each_draw_varies_other_queries_otherwise():
    rows = [{"messages": [{"role": "user", "content": f"What is thing {i}?"}], "rewrite": ""} for i in range(10)]
    draws = [varied(Dataset.from_list(rows), 0.3, None, lambda messages: None, draw) for draw in range(3)]
    assert [len(some) for some, _ in draws] == [3] * 3
    assert len({messages[0]["content"] for some, _ in draws for messages in some["messages"]}) == 9
    assert draws[1][1] == varied(Dataset.from_list(rows), 0.3, None, lambda messages: None, 1)[1]


def test_other_topics_of_greetings_and_of_no_user_at_all():
    messages = [{"role": "user", "content": "When was it built?"}]
    greeting = {"role": "assistant", "content": "Hi, how can I help?"}
    others = [[greeting, {"role": "user", "content": "Where is the lathe?"}], [greeting], [greeting, dict(greeting)]]
    longer = with_other_topics(messages, others, 4, random.Random(0))
    assert [message["content"] for message in longer if message["role"] == "user"] == [
        *["Where is the lathe?"] * 3,
        "When was it built?",
    ]
    assert with_other_topics(messages, others[1:], 4, random.Random(0)) == messages


@given(texts, st.integers(0, 100))
def test_typos_move_letters_and_lose_none(text, seed):
    misspelt = with_typos(text, random.Random(seed))
    assert sorted("".join(misspelt.split())) == sorted("".join(text.split()))
    assert len(misspelt.split()) == len(text.split())


def test_typos_touch_a_quarter_of_the_longer_words():
    text = "which lighthouse near harbour stood there before another replaced it"
    changed = [a != b for a, b in zip(text.split(), with_typos(text, random.Random(1)).split(), strict=True)]
    assert 1 <= sum(changed) <= 3


@pytest.mark.parametrize("count", [1, 3, 5, 20])
def test_other_topics_fill_up_to_the_count_and_stay_behind_the_system_message(count):
    messages = [
        {"role": "system", "content": "Be brief."},
        *[{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")],
        {"role": "user", "content": "Last?"},
    ]
    others = [[{"role": "system", "content": "No."}, {"role": "user", "content": "Hm?"}], [*messages[1:]]]
    longer = with_other_topics(messages, others, count, random.Random(0))
    assert sum(message["role"] == "user" for message in longer) == max(count, 4)
    assert [message["role"] for message in longer].count("system") == 1 and longer[0]["role"] == "system"
    assert longer[-len(messages) + 1 :] == messages[1:]
