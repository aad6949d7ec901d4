"""Conversations to text, for the teacher and for BM25. (To a prompt: `build_prompt` in `modeling_native_retrieval.py`,
which ships with the model.)"""

from collections.abc import Callable, Sequence
from typing import Any

Messages = Sequence[dict[str, Any]]


def turns(messages: Messages) -> list[str]:
    """The contents of a conversation's turns, in order: system messages and empty turns are none."""
    return [turn["content"].strip() for turn in messages if turn["role"] != "system" and turn["content"].strip()]


def last_question(messages: Messages) -> str:
    """The last user message with text in it; in a conversation without a user, its last turn."""
    questions = [message for message in messages if message["role"] == "user" and message["content"].strip()]
    return turns(questions or messages)[-1]


def full_history(messages: Messages, count_tokens: Callable[[str], int], max_tokens: int | None) -> str:
    """
    As many of the newest turns as fit into `max_tokens`, joined by line ends in their order; older ones are dropped
    whole. The last turn stays even if it alone is too long, and `None` is no limit.
    """
    *older, text = turns(messages)
    for turn in reversed(older):
        longer = f"{turn}\n{text}"
        if max_tokens is not None and count_tokens(longer) > max_tokens:
            break
        text = longer
    return text
