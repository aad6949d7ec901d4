"""native_retrieval/augmentation.py: whatever is put around a conversation, its question stays."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messages_native_retrieval import check_messages
from native_retrieval.augmentation import augment, with_distractor_turns, with_typos

texts = st.text(st.characters(categories=["L", "Nd", "P", "Zs"]), min_size=1, max_size=60).filter(str.strip)


@st.composite
def conversations(draw):
    """User and assistant in turns, the last one the user's."""
    turns = draw(st.lists(texts, min_size=1, max_size=7).filter(lambda turns: len(turns) % 2))
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


@settings(max_examples=200, deadline=None)
@given(conversations(), st.integers(0, 10**6))
def test_an_augmented_conversation_is_one_and_keeps_its_turns_in_order(messages, seed):
    before = [dict(message) for message in messages]
    changed = augment(messages, ["A passage."], random.Random(seed))
    check_messages(changed)
    assert messages == before, "the original was changed"
    kept = iter(message["content"] for message in changed)
    # All turns are there but the last question, which may have typos: the same letters in another order.
    assert all(any(message["content"] == content for content in kept) for message in messages[:-1])
    letters = sorted("".join(messages[-1]["content"].split()))
    assert any(sorted("".join(message["content"].split())) == letters for message in changed)
    assert changed == augment(messages, ["A passage."], random.Random(seed)), "the seed does not fix it"


def test_every_kind_of_augmentation_occurs():
    messages = [
        {"role": "user", "content": "Who painted Guernica?"},
        {"role": "assistant", "content": "Picasso."},
        {"role": "user", "content": "Where was he born and raised?"},
    ]
    rng = random.Random(0)
    changed = [augment(messages, ["A passage."], rng) for _ in range(200)]
    assert {m[0]["role"] for m in changed} == {"system", "user"}
    assert {m[-1]["role"] for m in changed} == {"user", "assistant", "tool"}
    assert any('"type": "function"' in m[0]["content"] for m in changed)
    assert any(message["role"] == "tool" for m in changed for message in m[:-1])
    assert any(messages[-1]["content"] not in [message["content"] for message in m] for m in changed)


def test_a_rewrite_takes_the_place_of_some_last_questions():
    messages = [{"role": "user", "content": "Hello"}, {"role": "user", "content": "his?"}]
    rng = random.Random(0)
    changed = [augment(messages, [], rng, "Picasso's?") for _ in range(200)]
    replaced = [any(message["content"] == "Picasso's?" for message in m) for m in changed]
    assert 20 < sum(replaced) < 80
    assert all(any(message["content"] == "his?" for message in m) != r for m, r in zip(changed, replaced, strict=True))


def test_distractor_turns_of_greetings_and_of_no_user_at_all():
    messages = [{"role": "user", "content": "When was it built?"}]
    greeting = {"role": "assistant", "content": "Hi, how can I help?"}
    others = [[greeting, {"role": "user", "content": "Where is the lathe?"}], [greeting], [greeting, dict(greeting)]]
    longer = with_distractor_turns(messages, others, 4, random.Random(0))
    assert [message["content"] for message in longer if message["role"] == "user"] == [
        *["Where is the lathe?"] * 3,
        "When was it built?",
    ]
    assert with_distractor_turns(messages, others[1:], 4, random.Random(0)) == messages


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
def test_distractor_turns_fill_up_to_the_count_and_follow_the_system_message(count):
    messages = [
        {"role": "system", "content": "Be brief."},
        *[{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")],
        {"role": "user", "content": "Last?"},
    ]
    others = [[{"role": "system", "content": "No."}, {"role": "user", "content": "Hm?"}], [*messages[1:]]]
    longer = with_distractor_turns(messages, others, count, random.Random(0))
    assert sum(message["role"] == "user" for message in longer) == max(count, 4)
    assert [message["role"] for message in longer].count("system") == 1 and longer[0]["role"] == "system"
    assert longer[-len(messages) + 1 :] == messages[1:]
