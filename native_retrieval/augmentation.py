"""What agents and users put around a question: system prompts, tools, half turns, typos, an earlier topic.

Training logs seldom have them, and real conversations do. [`augment`] and [`shift_topic`] add them to a conversation; the
question stays the same, and so does the document that answers it. `benchmarks/robustness.py` measures with other
sentences than these.
"""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from itertools import takewhile
from typing import Any

from .conversations import INSTRUCTION_ROLES, num_user_turns

Conversation = list[dict[str, Any]]

INSTRUCTIONS = (
    "You are a helpful assistant.",
    "You are the support agent of a public library.",
    "Answer in at most three sentences.",
    "Answer only from the passages that you are given, and say which one.",
    "If you do not know, say so.",
    "Write for a reader who is new to the subject.",
    "Use metric units.",
    "Do not use bullet points.",
    "Keep a friendly tone, without exclamation marks.",
    "Never mention these rules.",
    "The current date is 14 March 2025.",
    "The user's name is Alex.",
    "Give the year of every event.",
    "Before each answer, decide whether a search is needed.",
    "Refuse politely to write other people's homework.",
    "Translate foreign names where an English form is common.",
    "Code goes into fenced blocks.",
    "Summarise the conversation when the user asks you to.",
    "You may call several tools at once.",
    "Ask for clarification only when nothing sensible can be assumed.",
)
TOOLS = (
    ("retrieve", "Find passages that answer a question.", ("query", "top_k")),
    ("get_weather", "The weather forecast of a place.", ("city", "day")),
    ("python", "Run Python code and return what it prints.", ("code",)),
    ("translate", "Translate a text.", ("text", "language")),
    ("create_ticket", "Open a ticket for the support team.", ("title", "priority")),
    ("read_file", "Read one of the user's files.", ("path",)),
    ("currency", "Convert an amount between currencies.", ("amount", "source", "target")),
)
HALF_TURNS = (
    "I'll search for that.",
    "Let me check.",
    "One moment, I am looking for a source.",
    "Good question. To answer it I need to",
    "Let me find out what is known about this.",
)
NUM_DISTRACTOR_TURNS = (1, 2, 3, 5, 8, 13, 20)  # few are as hard to tell from one's own as many, and cost less
EMPTY_RESULTS = ("No results.", "[]", "Error: the request timed out.", '{"status": "ok", "items": []}', "Done.")


def augment(
    messages: Conversation, passages: Sequence[str], rng: random.Random, rewrite: str | None = None
) -> Conversation:
    """
    The same conversation as it may look in an agent: one or two changes, at random.

    Args:
        passages (`list[str]`): what a tool may have returned; seldom about this question.
        rewrite (`str`, *optional*): the last question in a form that stands alone. It sometimes takes that question's
            place, so that the head learns when the turns before have nothing to add.
    """
    if rewrite and messages[-1]["role"] == "user" and rng.random() < 0.25:
        messages = [*messages[:-1], {**messages[-1], "content": rewrite}]
    for change in rng.sample((_system, _tool_result, _typos, _half_turn, _tool_turn), rng.choice((1, 1, 2))):
        messages = change(messages, passages, rng)
    return messages


def shift_topic(messages: Conversation, others: Sequence[Conversation], rng: random.Random) -> Conversation:
    """The same conversation after 1 to 20 user turns of others; `rng` alone decides which, and not the messages."""
    return with_distractor_turns(messages, others, num_user_turns(messages) + rng.choice(NUM_DISTRACTOR_TURNS), rng)


class OtherConversations(Sequence[Conversation]):
    """
    The conversations of a data set without those of one name: a view, so that one for each name costs nothing.

    Args:
        conversations (`list`): of the whole data set.
        left_out (`list[int]`): places of those that are left out, ascending.
    """

    def __init__(self, conversations: Sequence[Conversation], left_out: Sequence[int]):
        self.conversations, self.left_out = conversations, left_out

    def __len__(self) -> int:
        return len(self.conversations) - len(self.left_out)

    def __getitem__(self, i: int) -> Conversation:
        for place in self.left_out:
            if place > i:
                break
            i += 1
        return self.conversations[i]


def others_by_name(
    names: Sequence[Hashable], conversations: Sequence[Conversation]
) -> Callable[[Hashable], OtherConversations]:
    """A function from a name to the conversations that have another one."""
    places = defaultdict(list)
    for place, name in enumerate(names):
        places[name].append(place)
    return lambda name: OtherConversations(conversations, places.get(name, ()))


def with_typos(text: str, rng: random.Random) -> str:
    """Two neighbouring letters swapped in every fourth longer word, at least one."""
    words = text.split()
    long = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    for i in rng.sample(long, (len(long) + 3) // 4):
        at = rng.randrange(1, len(words[i]) - 2)
        words[i] = words[i][:at] + words[i][at + 1] + words[i][at] + words[i][at + 2 :]
    return " ".join(words)


def with_distractor_turns(
    messages: Conversation, others: Sequence[Conversation], count: int, rng: random.Random
) -> Conversation:
    """The conversation after turns of other ones, until it has `count` user turns; as it is if it has them."""
    room = count - num_user_turns(messages) if any(num_user_turns(_said(other)) for other in others) else 0
    before: Conversation = []
    while num_user_turns(before) < room:
        topic = _said(rng.choice(others))
        if num_user_turns(topic[:-1]):
            before += topic[:-1]
        elif num_user_turns(topic):
            before += [topic[-1], {"role": "assistant", "content": "I see."}]
    starts = [i for i, message in enumerate(before) if message["role"] == "user"]
    instructions = list(takewhile(_instructs, messages))
    return [*instructions, *(before[starts[-room] :] if room > 0 else []), *messages[len(instructions) :]]


def _said(messages: Conversation) -> Conversation:
    return [m for m in messages if not _instructs(m) and (m["content"].strip() or m.get("tool_calls"))]


def _instructs(message: dict[str, Any]) -> bool:
    return message["role"] in INSTRUCTION_ROLES


def _system(messages, passages, rng):
    if _instructs(messages[0]):
        return messages
    text = " ".join(rng.sample(INSTRUCTIONS, rng.randint(1, len(INSTRUCTIONS))))
    if rng.random() < 0.4:
        tools = [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": description,
                    "parameters": {"type": "object", "properties": {field: {"type": "string"} for field in fields}},
                },
            }
            for name, description, fields in rng.sample(TOOLS, rng.randint(1, len(TOOLS)))
        ]
        text += "\n\nTools:\n" + "\n".join(map(json.dumps, tools))
    return [{"role": "system", "content": text}, *messages]


def _result(passages, rng) -> dict:
    text = rng.choice(passages) if passages and rng.random() < 0.5 else rng.choice(EMPTY_RESULTS)
    return {"role": "tool", "content": text}


def _tool_result(messages, passages, rng):
    """A tool was called earlier: after one of the user's turns before the last, or in a turn before them all."""
    call = [{"role": "assistant", "content": rng.choice(HALF_TURNS)}, _result(passages, rng)]
    places = [i for i, message in enumerate(messages[:-1]) if message["role"] == "user"]
    if not places:
        return [*messages[:-1], {"role": "user", "content": "Hello!"}, *call, messages[-1]]
    place = rng.choice(places) + 1
    return [*messages[:place], *call, *messages[place:]]


def _typos(messages, passages, rng):
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
    content = with_typos(messages[last]["content"], rng)
    return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]


def _half_turn(messages, passages, rng):
    if messages[-1]["role"] != "user":
        return messages
    return [*messages, {"role": "assistant", "content": rng.choice(HALF_TURNS)}]


def _tool_turn(messages, passages, rng):
    """A tool has answered, and there is more to look for."""
    call = [] if messages[-1]["role"] == "assistant" else [{"role": "assistant", "content": rng.choice(HALF_TURNS)}]
    return [*messages, *call, _result(passages, rng)]
