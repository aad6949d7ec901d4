# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""Messages of agents' frameworks as OpenAI-shaped dicts, which a model takes; this file knows no framework."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

ROLES = {"human": "user", "ai": "assistant", "chatbot": "assistant", "model": "assistant"}
ROLES |= {"developer": "system", "function": "tool"}  # which fewer chat templates know
CALLS = {"tool_use", "tool_call", "function_call", "server_tool_call", "invalid_tool_call", "server_tool_use"}
UNSAID = {"thinking", "redacted_thinking", "reasoning", "reasoning_content", "cache", "cache_point", *CALLS}
FIELDS = ("function_call", "refusal", "name", "tool_call_id")  # of a message, beside role, content and tool_calls
TEXT_KEYS = ("text", "page_content", "refusal")
NESTED_KEYS = ("content", "output", "cited_content", "value", "document", "resource")


def as_conversation(query: Any, convert: Callable[[Any], dict[str, Any] | None]) -> list[dict[str, Any]]:
    """
    A conversation from text, a message, a sequence of messages, or anything that holds `messages`, such as a graph's state.

    Args:
        convert: makes a dict of a framework's message; `None` for what is no message of it.

    Raises:
        `ValueError`: for anything else, and for no messages.
    """
    if isinstance(query, Mapping) and "messages" in query:
        query = query["messages"]
    elif hasattr(query, "to_messages"):  # LangChain's prompt values
        query = query.to_messages()
    elif hasattr(query, "messages"):
        query = query.messages
    is_pair = isinstance(query, tuple) and len(query) == 2 and str(query[0]) in {*ROLES, *ROLES.values()}
    if isinstance(query, str | Mapping) or is_pair or convert(query) is not None:
        query = [query]
    elif not isinstance(query, Iterable) or isinstance(query, bytes) or hasattr(type(query), "model_fields"):
        raise ValueError(
            f"The query is of type {type(query).__name__}, wanted text or messages; give the conversation."
        )
    messages = [_message(message, i, convert) for i, message in enumerate(query)]
    if not messages:
        raise ValueError("The query has 0 messages, wanted at least 1; give the conversation's messages.")
    # A turn that says nothing, of thoughts alone for example, is none; an empty last one is for the model to refuse.
    return [message for message in messages[:-1] if message["content"] or len(message) > 2] + messages[-1:]


def message_of(role: str, content: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A message as OpenAI's API has it: `role`, `content` (a string), and of `fields` those in `FIELDS` that are set."""
    blocks = content if isinstance(content, list | tuple) else [content]
    calls = fields.get("tool_calls") or [block for block in map(_as_dict, blocks) if _type(block) in CALLS]
    fields = {"tool_calls": [_call(_as_dict(call)) for call in calls], **{name: fields.get(name) for name in FIELDS}}
    role = getattr(role, "value", role)
    message = {"role": ROLES.get(role, role), "content": text_of(content)}
    return message | {name: value for name, value in fields.items() if value}


def text_of(content: Any) -> str:
    """The text of a message's content: a line for each part; pictures and other media leave a mark such as `[image]`."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list | tuple):
        return "\n".join(filter(None, map(text_of, content)))
    if callable(getattr(content, "get_content", None)):  # LlamaIndex's nodes
        return content.get_content()
    block = _as_dict(content)
    if not isinstance(block, Mapping):
        return str(content)
    kind = _type(block)
    if kind in UNSAID:
        return ""
    if kind or len(block) == 1 or "page_content" in block:
        texts = [block[key] for key in TEXT_KEYS if isinstance(block.get(key), str)]
        nested = [text_of(block[key]) for key in NESTED_KEYS if block.get(key)]
        if texts or nested:
            title = block.get("title") if nested else None
            return "\n".join(filter(None, (title, *(texts or nested)[:1])))
        if isinstance(source := block.get("source"), Mapping) and source.get("type") == "text":
            return text_of(source.get("data"))
    if kind and kind != "json":
        mime = str(block.get("mime_type") or "").split("/")[0] if kind == "media" else ""
        return "" if kind.endswith("text") else f"[{mime or re.sub('^input_|_url$', '', kind)}]"
    return json.dumps(block.get("json", block), ensure_ascii=False, default=str)


def _message(message: Any, i: int, convert: Callable[[Any], dict[str, Any] | None]) -> dict[str, Any]:
    if (converted := convert(message)) is not None:
        return converted
    if isinstance(message, str):
        return message_of("user", message, {})
    if isinstance(message, list | tuple) and len(message) == 2 and isinstance(message[0], str):
        return message_of(*message, {})
    if isinstance(message, Mapping):
        for key in ("data", "kwargs"):  # as LangChain serialises messages
            message = {**message, **message[key]} if isinstance(message.get(key), Mapping) else message
        role = message.get("role", message.get("type"))
        if isinstance(role, str):
            return message_of(role, message.get("content", message.get("blocks")), message)
    raise ValueError(
        f"Message {i} of the query is a {type(message).__name__}"
        f"{' without a role' if isinstance(message, Mapping) else ''}, wanted a message; give {{'role', 'content'}}."
    )


def _as_dict(block: Any) -> Any:
    """A part of a message as a dict, if it is an object of a framework."""
    if hasattr(block, "block_type"):
        return {"type": block.block_type, **vars(block)}
    return block.model_dump() if hasattr(block, "model_dump") else block


def _type(block: Any) -> str | None:
    return (block.get("type") or block.get("block_type")) if isinstance(block, Mapping) else None


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call of any framework as OpenAI has it; the arguments are a JSON string."""
    function = call.get("function") or call
    name = function.get("name") or function.get("tool_name")
    keys = ("arguments", "args", "input", "tool_kwargs")
    arguments = next((function[key] for key in keys if function.get(key) is not None), {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, default=str)
    call_id = call.get("call_id") or call.get("tool_call_id") or call.get("id")
    said = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return said | ({"id": call_id} if call_id else {})
