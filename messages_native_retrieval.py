# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""Messages as agents send them: read, checked, cleaned, folded into what a chat template knows, shortened.

It knows dicts and strings, and nothing of tokenizers. Ships to the Hub; imports transformers' logging only.
"""

import bisect
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ALIASES = {"human": "user", "ai": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant"}
MEDIA = ("image", "audio", "video", "file", "document", "media")
CUT = "\n[...]\n"  # where the middle of a long text was
SHORTEST_RESULT, SHORTEST_TEXT = 128, 16  # characters that are left of a text whose middle is cut
Message = dict[str, Any]


def as_conversations(queries: Any, tools: list | None = None) -> list[tuple[list[Message], list | None]]:
    """
    What callers give for one or several queries, to `(messages, tools)` pairs.

    A query is a string, a message, a conversation, or a row `{"messages": [...], "tools": [...]}`. A message is a dict
    in OpenAI's format, a `(role, content)` pair, or an object with `model_dump`. Several are any sequence of these.

    Raises:
        `ValueError`: naming the query that is none of these.
    """
    if isinstance(queries, (str, Mapping)) or (_is_message(queries) and not isinstance(queries, list)):
        queries = [queries]
    elif not isinstance(queries, Iterable) or isinstance(queries, bytes) or hasattr(queries, "requires_grad"):
        raise ValueError(f"queries is a {type(queries).__name__}; give a string, a conversation, or a list of either")
    queries = list(queries)
    if queries and all(map(_is_message, queries)):
        queries = [queries]
    kinds = {str if isinstance(query, str) else _is_message(query) for query in queries}
    if len(kinds) > 1 or True in kinds:
        raise ValueError("queries mixes strings, messages and conversations; give a list of one kind")
    found = []
    for i, query in enumerate(queries):
        own, name = tools, "conversation" if len(queries) == 1 else f"conversation {i}"
        if isinstance(query, str):
            query, name = [{"role": "user", "content": query}], f"query {i}"
        elif isinstance(query, Mapping):
            query, own = query["messages"], clean(query.get("tools")) or tools
        found.append((check_messages(query, name), own))
    return found


def is_one(queries: Any) -> bool:
    """Whether [`as_conversations`] takes this for one query, and not for a sequence of them."""
    if isinstance(queries, (str, Mapping)) or (_is_message(queries) and not isinstance(queries, list)):
        return True
    return isinstance(queries, (list, tuple)) and bool(queries) and all(map(_is_message, queries))


def last_question(messages: list[Message]) -> str:
    """The text of the user's last turn that has any; without a user, of the last turn; `""` if there is none."""
    said = [
        (m["role"], m["content"].strip()) for m in messages if has_text(m["content"]) and m["role"] not in ROLES[:2]
    ]
    return next((text for role, text in reversed(said) if role == "user"), said[-1][1] if said else "")


def _is_message(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "messages" not in value
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[0], str)
    return hasattr(value, "model_dump") or (pair and ALIASES.get(value[0], value[0]) in ROLES)


def _as_dict(message: Any) -> Message | None:
    """The message as a dict with its OpenAI role, cleaned; `None` if it is no message."""
    if hasattr(message, "model_dump"):
        message = message.model_dump(exclude_none=True)
    elif _is_message(message) and not isinstance(message, Mapping):
        message = {"role": message[0], "content": message[1]}
    if not isinstance(message, Mapping):
        return None
    message = {key: value for key, value in clean(message).items() if value is not None and value != []}
    role = message.get("role", message.get("type"))
    if isinstance(role, str):
        role = role.removesuffix("MessageChunk").lower()  # LangChain's, of a stream
    return message | {"role": ALIASES.get(role, role) if isinstance(role, str) else role}


def check_messages(messages: Any, name: str = "conversation") -> list[Message]:
    """
    A conversation that a query can be taken from, as [`clean_messages`] gives it.

    Raises:
        `ValueError`: in one line, for anything else. It never quotes the text: that may be private, and errors end in logs.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ValueError(f"{name} is a {type(messages).__name__}; give a list of {{'role', 'content'}} messages")
    given = list(messages)
    if not given:
        raise ValueError(f"{name} is empty; give at least one message")
    messages = [_as_dict(message) for message in given]
    for i, message in enumerate(messages):
        if message is None or message["role"] is None:
            kind = type(given[i]).__name__ if message is None else "dict without a role"
            raise ValueError(f"{name}, message {i}, is a {kind}; give {{'role', 'content'}}")
        if message["role"] not in ROLES:
            raise ValueError(f"{name}, message {i}: unknown role {message['role']!r}; use one of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, (str, list, dict, type(None))):
            kind = type(content).__name__
            raise ValueError(f"{name}, message {i}: content is a {kind}; give a string, a list of parts, or null")
    cleaned = clean_messages(messages)
    if cleaned[-1]["role"] == "user" and not has_text(cleaned[-1]["content"]):
        raise ValueError(f"{name}: the last turn, message {len(messages) - 1}, is empty; give the user's question")
    if not any(has_text(m["content"]) or m.get("tool_calls") for m in cleaned if m["role"] not in ROLES[:2]):
        raise ValueError(f"{name} has no text in any turn; give at least one turn with text")
    return cleaned


def has_text(text: str) -> bool:
    """Whether a reader would see anything of this text: white space, zero-width characters and fillers are nothing."""
    unseen = ("Cc", "Cf", "Cs", "Mn", "Me", "Zl", "Zp", "Zs")
    return any(unicodedata.category(c) not in unseen and c not in "\u115f\u1160\u2800\u3164\uffa0" for c in text)


def clean_messages(messages: Iterable[Any]) -> list[Message]:
    """
    Messages in OpenAI's format to dicts whose `content` is a string: parts are joined by a line break, images and audio
    leave a short mark, `refusal` and `function_call` become content and `tool_calls`, and invalid text is replaced.
    """
    cleaned = []
    for message in map(_as_dict, messages):
        audio, calls = message.get("audio"), message.pop("tool_calls", None)
        text = _text(message.get("content", message.pop("blocks", None))) or _text(message.pop("refusal", None))
        message["content"] = text or _text(audio.get("transcript") if isinstance(audio, dict) else None)
        calls = [{"function": message.pop("function_call")}] if "function_call" in message else calls
        calls = [call for call in map(_call, calls if isinstance(calls, list) else ()) if call]
        cleaned.append(message | ({"tool_calls": calls} if calls else {}))
    return cleaned


def _call(call: Any) -> dict[str, Any] | None:
    """A tool call in OpenAI's format; LangChain's has `args`. `None` if it is none."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    if function is call:
        function = {"name": call["name"], "arguments": call.get("arguments", call.get("args", {}))}
    return {**call, "type": "function", "function": function}


def clean(value: Any) -> Any:
    """The same with every string in it valid Unicode: lone surrogates become U+FFFD, NUL is left out. Arrays become lists."""
    if isinstance(value, str):
        if not value.isascii():
            value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return value.replace("\0", "")
    if isinstance(value, Mapping):
        return {clean(key): clean(part) for key, part in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    return [clean(part) for part in value] if isinstance(value, (list, tuple)) else value


def _text(content: Any) -> str:
    """The text of a message's content: a string, null, a part, or a list of parts; of what is none of these, its JSON."""
    if isinstance(content, list):
        return "\n".join(filter(None, map(_text, content)))
    if not isinstance(content, dict):
        return content if isinstance(content, str) else "" if content is None else str(content)
    kind = str(content.get("type", content.get("block_type", "")))
    if kind or len(content) == 1:
        for key in ("text", "refusal", "transcript", "content", "thinking", "reasoning"):
            if content.get(key):
                return _text(content[key])
    medium = next((medium for medium in MEDIA if medium in kind), None)
    if medium or kind.endswith("text"):
        return f"[{medium}]" if medium else ""
    return json.dumps(content, ensure_ascii=False, default=str)


def forms(messages: list[Message], knows: set[str]) -> Iterable[list[Message]]:
    """
    A conversation for a chat template: as it is, but for what the template does not know, and then in forms that stricter
    templates take. `knows`: the roles that it writes, `"late system"` and `"tool_calls"`.
    """
    yield fold(messages, knows)
    yield strict(fold(messages, knows))
    yield fold(messages, knows - {"tool_calls"})
    yield alternating(fold(messages, knows - {"tool_calls", "tool", "function"}))


def fold(messages: list[Message], knows: set[str]) -> list[Message]:
    """What the chat template does not know, as text or in another role, so that no call and no result is lost."""
    folded, moved = [], []
    for message in messages:
        message, role = dict(message), message["role"]
        if "tool_calls" in message and "tool_calls" not in knows:
            calls = [call["function"] for call in strict([message])[0]["tool_calls"]]
            texts = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
            del message["tool_calls"]
            message["content"] = "\n".join(filter(None, [message["content"], *texts]))
        if role == "developer" and role not in knows:
            message["role"] = role = "system"
        if role == "function" and role not in knows:
            message["role"] = role = "tool"
        if role == "tool" and role not in knows:
            message |= {"role": "user", "content": f"Tool result:\n{message['content']}"}
        if role == "system" and "system" not in knows:
            message["role"] = "user"
        elif role == "system" and folded and "late system" not in knows:
            moved.append(message["content"])
            continue
        folded.append(message)
    if moved:
        logger.warning_once("The chat template refuses system messages after the first; they move to the front.")
        first = folded.pop(0)["content"] if folded and folded[0]["role"] == "system" else ""
        folded.insert(0, {"role": "system", "content": "\n\n".join(filter(None, [first, *moved]))})
    return folded


def strict(messages: list[Message]) -> list[Message]:
    """OpenAI's arguments are JSON in a string, its ids of any length; some templates want them parsed, and nine letters."""
    strict = json.loads(json.dumps(messages, default=str))
    for message in strict:
        calls = message.get("tool_calls", ())
        for function in (call["function"] for call in calls if "arguments" in call["function"]):
            function["arguments"] = _parsed(function["arguments"])
        for holder, key in (
            *((call, "id") for call in calls),
            *[(message, "tool_call_id")] * (message["role"] == "tool"),
        ):
            holder[key] = re.sub("[^a-zA-Z0-9]", "", str(holder.get(key, "")))[-9:].rjust(9, "0")
    return strict


def alternating(messages: list[Message]) -> list[Message]:
    """The same for a template that wants a user's turn first, and users' and assistant's turns by turns."""
    merged: list[Message] = []
    for message in messages:
        role = message["role"] if message["role"] in ("assistant", "system") else "user"
        if not message["content"].strip():
            continue
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += "\n" + message["content"]
        else:
            merged.append({"role": role, "content": message["content"]})
    first = int(merged[0]["role"] == "system")
    if len(merged) == first or merged[first]["role"] == "assistant":
        merged.insert(first, {"role": "user", "content": "Hello."})
    return merged


def plain_prompt(messages: list[Message]) -> str:
    """A prompt for a tokenizer without a chat template."""
    messages = fold(messages, {*ROLES, "late system"})
    text = "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in messages)
    return text[:-1] if messages[-1]["role"] == "assistant" else text + "Assistant:"


def shorten(messages: list[Message], limit: int, fits: Callable[[list[Message]], bool]) -> list[Message]:
    """
    A long conversation, until it fits a prompt of `limit` tokens: tool results lose their middle, then the oldest turns go,
    then what follows the last question loses its middle, and last system messages and the question.
    """

    def cut(messages: list[Message], places: Iterable[int], least: int) -> list[Message]:
        size, places = 2 * limit, set(places)  # in characters: half a prompt, at four characters a token
        while size >= least and not fits(messages):
            messages = [_cut(message, size) if i in places else message for i, message in enumerate(messages)]
            size //= 2
        return messages

    roles = [message["role"] for message in messages]
    messages = cut(messages, (i for i, role in enumerate(roles) if role in ROLES[4:]), SHORTEST_RESULT)
    question = max((i for i, role in enumerate(roles) if role == "user"), default=len(roles) - 1)
    # A result never stays without its call: the last round stays whole, and others go whole.
    last = max((i for i, role in enumerate(roles) if role not in ROLES[4:]), default=0)
    old = [i for i, role in enumerate(roles[:question]) if role not in ROLES[:2]]
    old += [i for i in range(question + 1, last) if roles[i] not in ROLES[:2]]
    ends = [n for n in range(len(old)) if roles[old[n]] not in ROLES[4:]] + [len(old)]

    def without(end: int) -> list[int]:
        gone = set(old[:end])
        return [i for i in range(len(roles)) if i not in gone]

    fewest = bisect.bisect_left(ends, True, hi=len(ends) - 1, key=lambda n: fits([messages[i] for i in without(n)]))
    kept = without(ends[fewest])
    spared = [n for n, i in enumerate(kept) if i == question or roles[i] in ROLES[:2]]
    messages = cut([messages[i] for i in kept], set(range(len(kept))) - set(spared), SHORTEST_TEXT)
    return cut(messages, spared, SHORTEST_TEXT)


def _cut(message: Message, size: int) -> Message:
    """The message with texts of at most some `size` characters: longer ones lose their middle."""

    def shorter(value: Any) -> Any:
        if isinstance(value, str) and len(value) > size:
            return value[: size // 2] + CUT + value[len(value) - size // 2 :]
        if isinstance(value, dict):
            return {key: shorter(part) for key, part in value.items()}
        return [shorter(part) for part in value] if isinstance(value, list) else value

    message = message | {key: shorter(message[key]) for key in ("content", "reasoning_content") if key in message}
    if len(str(calls := message.get("tool_calls", ""))) > size:
        calls = [{**call, "function": dict(call["function"])} for call in calls]
        for function in (call["function"] for call in calls):
            function["arguments"] = shorter(_parsed(function.get("arguments")))
        message["tool_calls"] = calls
    return message


def _parsed(arguments: Any) -> Any:
    """OpenAI's arguments are JSON in a string."""
    with suppress(ValueError, TypeError):
        return clean(json.loads(arguments))
    return arguments


def strings(value: Any) -> Iterable[str]:
    """All strings in it, keys of dicts included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from strings(part)


def broken_keys(value: Any, marks: re.Pattern) -> Any:
    """The same with an invisible character in each of these marks that a key of a dict spells."""
    if isinstance(value, list):
        return [broken_keys(part, marks) for part in value]
    if not isinstance(value, dict):
        return value
    parts = {key: broken_keys(part, marks) for key, part in value.items()}
    return {
        marks.sub(lambda mark: f"{mark[0][0]}\u200b{mark[0][1:]}", key) if isinstance(key, str) else key: part
        for key, part in parts.items()
    }


__all__ = [
    "as_conversations",
    "broken_keys",
    "check_messages",
    "clean",
    "clean_messages",
    "fold",
    "forms",
    "has_text",
    "plain_prompt",
    "shorten",
    "strings",
]
