# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""Messages as agents send them: read, checked, cleaned, folded into what a chat template knows, shortened.

It knows dicts and strings, and nothing of tokenizers. Ships to the Hub; imports transformers' logging only.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ALIASES = {"human": "user", "ai": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant"}
MEDIA = ("image", "audio", "video", "file", "document", "media")
CUT = "\n[...]\n"  # where the middle of a long text was
SHORTEST_CUT = 32  # tokens that are left of a text whose middle is cut
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
        for function in (call["function"] for call in calls):
            with suppress(ValueError, TypeError, KeyError):
                function["arguments"] = clean(json.loads(function["arguments"]))
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


def shorter(messages: list[Message], limit: int) -> Iterable[list[Message]]:
    """Ever shorter forms of a conversation; `limit` is the prompt's, in tokens."""
    caps = [limit >> i for i in range(1, 32) if limit >> i >= SHORTEST_CUT]
    results = [i for i, message in enumerate(messages) if message["role"] == "tool"]
    for cap in caps if results else ():
        messages = [_cut(message, cap) if i in results else message for i, message in enumerate(messages)]
        yield messages
    messages = list(messages)
    while True:
        question = max((i for i, m in enumerate(messages[:-1]) if m["role"] == "user"), default=len(messages) - 1)
        if messages[-1]["role"] == "user":
            question = len(messages) - 1
        old = [i for i, m in enumerate(messages[:question]) if m["role"] not in ROLES[:2]]
        old = old or list(range(question + 1, len(messages) - 1))
        if not old:
            break
        # A tenth at a time, so that a very long history is not rendered once for every turn in it.
        count = max(1, len(old) // 10)
        while count < len(old) and messages[old[count]]["role"] == "tool":  # results go with their call
            count += 1
        messages = [message for i, message in enumerate(messages) if i not in set(old[:count])]
        yield messages
    for cap in caps:
        messages = [_cut(message, cap) for message in messages]
        yield messages


def _cut(message: Message, tokens: int) -> Message:
    """The message without the middle of its text, if that is longer than some `tokens`, at four characters each."""
    text, size = message["content"], 4 * tokens
    if len(text) <= size:
        return message
    return {**message, "content": text[: size // 2] + CUT + text[len(text) - size // 2 :]}


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
    "shorter",
    "strings",
]
