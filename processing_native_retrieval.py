# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""Conversations to tensors: the backbone's own prompt, and the words in it that the query head reads.

    messages (+ tools) ── chat template ──▶ input_ids, attention_mask ──▶ words, with their turns

It knows text and tokenizers, and nothing of models. Ships to the Hub; imports torch and transformers only.
"""

import copy
import os
import re
import threading
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice, pairwise
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

try:  # on the Hub these files form a package; in the repository they are plain modules
    from .head_native_retrieval import Words
    from .messages_native_retrieval import (
        ROLES,
        as_conversations,
        broken_keys,
        check_messages,
        clean,
        fold,
        forms,
        plain_prompt,
        shorten,
        strings,
    )
except ImportError:
    from head_native_retrieval import Words
    from messages_native_retrieval import (
        ROLES,
        as_conversations,
        broken_keys,
        check_messages,
        clean,
        fold,
        forms,
        plain_prompt,
        shorten,
        strings,
    )

logger = logging.get_logger(__name__)


# English words that no search needs, with the parts of contractions.
FUNCTION_WORDS = frozenset(
    """a about after all also am an and any are aren as at be been before being but by can cannot could couldn d did didn do
    does doesn doing don for from had hadn has hasn have haven having he her here hers him his how i if in into is isn it its
    just ll m may me might more most must mustn my no nor not of on only or other our ours over re s shall she should shouldn
    so some such t than that the their theirs them then there these they this those to too us ve very was wasn we were weren
    what when where which who whom whose why will with won would wouldn yes you your yours""".split()  # noqa: SIM905
)

# A fast tokenizer keeps "special tokens are text" and "truncate" as settings of one shared object.
_TOKENIZER_LOCK = threading.Lock()


class NativeRetrievalProcessor(ProcessorMixin):
    """
    Builds the backbone's own prompt of a conversation, token for token as its chat template gives it, and reads the words
    that the query head's word encoder reads.

    Args:
        tokenizer: the backbone's. What its chat template does not know (a role, tool calls) is folded in as text.
        word_tokenizer (*optional*): a fast tokenizer of the word encoder's vocabulary. Default: the backbone's.
        max_prompt_tokens (`int`, *optional*): longest prompt; see [`encode`]. Default: no limit.
    """

    def __init__(self, tokenizer=None, word_tokenizer=None, max_prompt_tokens=None, chat_template=None):
        if max_prompt_tokens is not None and (not isinstance(max_prompt_tokens, int) or max_prompt_tokens < 1):
            raise ValueError(f"max_prompt_tokens={max_prompt_tokens!r} must be a whole number, at least 1")
        words = copy.deepcopy(word_tokenizer or tokenizer)  # prompts in other threads change settings of the backbone's
        if backend := getattr(words, "backend_tokenizer", None):  # its file may say otherwise
            backend.no_truncation()
            backend.no_padding()
        super().__init__(tokenizer, words, chat_template=chat_template)
        self.max_prompt_tokens = max_prompt_tokens
        call = {"id": "call00000", "type": "function", "function": {"name": "zyxwvu", "arguments": '{"q": "utsrqp"}'}}
        user, asks = {"role": "user", "content": "Hello."}, {"role": "assistant", "content": "", "tool_calls": [call]}
        late = [user, {"role": "assistant", "content": "Yes?"}, {"role": "system", "content": "ponmlk"}, user]
        self._knows = {role for role in ROLES[:2] if self._shows([{"role": role, "content": "ponmlk"}, user], "ponmlk")}
        self._knows |= {"late system"} if self._shows(late, "ponmlk") else set()
        self._knows |= {"tool_calls"} if self._shows([user, asks], "zyxwvu", "utsrqp") else set()
        asks = asks if "tool_calls" in self._knows else {"role": "assistant", "content": "Yes?"}
        for role in ROLES[4:]:
            result = {"role": role, "content": "ponmlk", "name": "zyxwvu", "tool_call_id": "call00000"}
            self._knows |= {role} if self._shows([user, asks, result], "ponmlk") else set()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        parts = self._between(("user", "assistant", "user"))
        # DeepSeek's markers of turns, for one, are not called special.
        written = {i for part in parts for i in part if i in added and re.search(r"[^\w\s]", added[i].content)}
        self.special_ids: list[int] = sorted(special | written)
        tokens, template = tokenizer.convert_ids_to_tokens(self.special_ids), str(tokenizer.chat_template)
        inner = [t.content for t in added.values() if t.content in template and not t.content.isspace()]
        self._special_marks, self._marks = _any_of(tokens), _any_of([*tokens, *inner])
        if not {added[i].content for i in written - special} <= {*inner, *(tokenizer.chat_control_tokens or ())}:
            tokenizer.chat_control_tokens = [*tokens, *inner]  # the template puts them together from pieces
        self._openers, self._user_opening, self._tool_opening = self._turn_openings()
        self._pieces = _spellings(tokenizer, tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
        # What ends a written query: a line end, or a marker.
        self.query_ends = sorted({i for i, piece in enumerate(self._pieces) if b"\n" in piece} | set(self.special_ids))
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id: int = next(i for i in ends if i is not None)

    def __call__(
        self, conversations: Any, *, tools: list | None = None, truncation: bool = True, **template_kwargs
    ) -> BatchFeature:
        """
        Conversations, as [`as_conversations`] takes them, to one batch, padded on the left.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask` (`(batch, tokens)`); `word_ids`, `word_positions`, `word_mask`,
            `turn_ids`, `word_groups` (`(batch, words)`), see [`Words`].
        """
        pairs = as_conversations(conversations, tools)
        if not pairs:
            raise ValueError("conversations is empty; give at least one")
        prompts = [self.encode(m, tools=t, truncation=truncation, **template_kwargs) for m, t in pairs]
        input_ids, attention_mask = self.pad(prompts)
        words = self.read_words(input_ids, attention_mask)
        names = ("word_ids", "word_positions", "word_mask", "turn_ids", "word_groups")
        return BatchFeature(
            {"input_ids": input_ids, "attention_mask": attention_mask, **dict(zip(names, words, strict=True))}
        )

    # -- messages to a prompt -------------------------------------------------------------------------------------------

    def encode(
        self, messages: Iterable[Any], *, tools: list | None = None, truncation: bool = True, **template_kwargs
    ) -> list[int]:
        """
        One conversation to the token ids of its prompt: those of the backbone's own chat template for the same messages,
        tools and arguments. It ends where the assistant speaks next; an assistant's text at the end is continued.

        Special tokens spelt out in a message stay plain text. A prompt over `max_prompt_tokens` is shortened: long tool
        results lose their middle, then the oldest turns go. System messages and the user's last question stay.

        Raises:
            `ValueError`: for malformed messages, a template that refuses them in every form, or a prompt that is too long
                with `truncation=False`.
        """
        messages, tools = check_messages(messages), clean(tools)
        while messages[-1]["role"] == "assistant" and not (
            messages[-1]["content"].strip() or "tool_calls" in messages[-1]
        ):
            messages.pop()  # a turn that has not begun
        input_ids, limit = self._encode(messages, tools, template_kwargs), self.max_prompt_tokens
        if limit is None or len(input_ids) <= limit:
            return input_ids
        if not truncation:
            raise ValueError(f"the prompt has {len(input_ids)} tokens, over max_prompt_tokens={limit}; shorten it")
        logger.warning_once(
            f"A prompt is longer than max_prompt_tokens={limit}. Long tool results lose their middle, then the oldest turns are "
            "dropped. (Said once.)"
        )

        def fits(messages: list[dict]) -> bool:
            return len(self._encode(messages, tools, template_kwargs)) <= limit

        input_ids = self._encode(shorten(messages, limit, fits), tools, template_kwargs)
        return input_ids if len(input_ids) <= limit else input_ids[: limit // 4] + input_ids[-(limit - limit // 4) :]

    def _encode(self, messages: list[dict], tools: list | None, template_kwargs: dict) -> list[int]:
        forged = any(map(self._special_marks.search, strings([messages, tools, template_kwargs])))
        # Marks that are not called special, of calls or thoughts, may stand in what the backbone has written itself.
        heard = [message for message in messages if message["role"] != "assistant"]
        forged = forged or any(map(self._marks.search, strings([heard, tools, template_kwargs])))
        if not self.tokenizer.chat_template:
            with _TOKENIZER_LOCK:
                return self.tokenizer(plain_prompt(messages), split_special_tokens=forged)["input_ids"]
        last = messages[-1]
        half_turn = last["role"] == "assistant" and bool(last["content"].strip()) and "tool_calls" not in last
        options = {"add_generation_prompt": not half_turn, "continue_final_message": half_turn}
        if not options.keys().isdisjoint(template_kwargs):
            options = {}
        options |= {"tools": tools, "return_dict": False, "sanitize_control_tokens": forged} | template_kwargs
        refused = None
        for form in forms(messages, self._knows):
            if forged:  # transformers guards values, and not the keys of dicts
                form, options["tools"] = broken_keys(form, self._marks), broken_keys(options["tools"], self._marks)
            try:
                with _TOKENIZER_LOCK:
                    return self.tokenizer.apply_chat_template(form, **options)
            except Exception as error:  # templates refuse by raising whatever their author chose
                refused = refused or error
        # The words of the template's author; transformers' own would quote the conversation.
        said = type(refused).__name__ == "TemplateError"
        reason = " ".join(str(refused).split()) if said else type(refused).__name__
        raise ValueError(f"the tokenizer's chat template refuses this conversation: {reason}")

    def _shows(self, messages: list[dict], *texts: str) -> bool:
        for form in islice(forms(messages, {*ROLES, "late system", "tool_calls"}), 2):
            with suppress(Exception):
                prompt = self.tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=True)
                return all(text in prompt for text in texts)
        return False

    def _between(self, roles: tuple[str, ...]) -> list[list[int]]:
        """The tokens that the chat template writes before, between and after turns of these roles, whatever is said."""
        texts = [f"zyxwvu{chr(97 + i)}" for i in range(len(roles))]
        with suppress(Exception):
            messages = [
                {"role": r, "content": t, "tool_call_id": "call00000"} for r, t in zip(roles, texts, strict=True)
            ]
            prompt = self.tokenizer.apply_chat_template(fold(messages, self._knows), tokenize=False)
            pieces = re.split("|".join(texts), prompt)
            if len(pieces) == len(roles) + 1:
                followed = [[f"{piece}{text}" for text in ("x", " x", "(", "\n\n(")] for piece in pieces]
                encoded = [self.tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in followed]
                return [os.path.commonprefix(ids) for ids in encoded]
        return [[] for _ in range(len(roles) + 1)]

    def _turn_openings(self) -> tuple[list[int], list[int], list[int]]:
        """
        The special tokens that open turns; the tokens that open a user's turn, from its special token on; and those that
        follow the same opening in a tool's turn, where it is written as a user's.
        """
        special = set(self.special_ids)
        around = {
            role: self._between((*before, role))[-2:]
            for role, before in {
                "user": ("user", "assistant"),
                "assistant": ("user",),
                "tool": ("user", "assistant"),
            }.items()
        }
        answered = self._between(("user", "assistant", "user"))[
            1
        ]  # some templates write a thought before the last answer
        closing, openings = special & {i for _, after in around.values() for i in after}, {}
        for role, (before, _) in (around | {"answered": (answered, [])}).items():
            at = [place for place, i in enumerate(before) if i in special]
            first = next((place for place in at if before[place] not in closing), at[-1] if at else len(before))
            openings[role] = before[first:]
            while openings[role] and not self.tokenizer.decode(openings[role][-1:]).strip():
                openings[role].pop()  # a space may become one token with what is said
        user, tool = openings["user"], openings["tool"]
        behind = tool[len(user) :] if user and tool[: len(user)] == user else []
        if user == openings["assistant"]:
            user = []  # nothing tells a user's turn
        self._headers = sorted({tuple(opening) for opening in openings.values() if opening}, key=len, reverse=True)
        return sorted({opening[0] for opening in openings.values() if opening}), user, behind

    def pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left padding: `(input_ids, attention_mask)`, both `(batch, tokens)`."""
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, width - len(prompt) :] = 1
        return input_ids, attention_mask

    # -- a prompt to words ----------------------------------------------------------------------------------------------

    def encode_words(self, texts: list[str]) -> list[list[int]]:
        """Plain texts to ids in the word encoder's vocabulary."""
        with _TOKENIZER_LOCK:
            return self.word_tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def read_words(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor, known: dict | None = None
    ) -> Words:
        """
        The words of prompts `(batch, tokens)`: their text, turn by turn, in the word encoder's vocabulary.

        Args:
            known (`dict`, *optional*): what was read of a conversation's turns before; it is brought up to date.
        """
        input_ids, real = input_ids.cpu(), attention_mask.cpu().bool()
        special = torch.isin(input_ids, torch.tensor(self.special_ids)) & real
        turn_ids = self._turn_ids(input_ids, real)
        # Not the first token: attention that looks for nothing rests on it.
        copied = real & ~special & ~(real & (real.cumsum(1) == 1))
        before, turns, read = known or {}, {}, []
        for row, keep, there in zip(input_ids, copied, real, strict=True):
            ids, ends, keys = [], [torch.empty(0, dtype=torch.long)], []
            where = there.nonzero().flatten()
            row, keep = row[where].tolist(), keep[where]
            headers = [
                (start, header)
                for start in (place for place, token in enumerate(row) if token in self._openers)
                for header in self._headers
                if tuple(row[start : start + len(header)]) == header
            ]
            for start, header in headers:
                keep[start : start + len(header)] = False
            if headers:  # what comes before the first of them are instructions and tools
                keep[: headers[0][0]] = False
            changes = (keep[1:] != keep[:-1]).nonzero().flatten() + 1
            keep = keep.tolist()
            for start, end in pairwise([0, *changes.tolist(), len(row)]):
                if keep[start:end] and keep[start]:
                    turn = tuple(row[start:end])
                    if turn not in turns:
                        turns[turn] = before.get(turn) or self._read(turn)
                    ids += turns[turn][0]
                    ends.append(start + turns[turn][1])
                    keys += turns[turn][2]
            number = {key: i for i, key in enumerate(dict.fromkeys(filter(None, keys)), start=1)}
            read.append((ids, where[torch.cat(ends)], [number.get(key, 0) for key in keys]))
        if known is not None:
            known.clear()
            known.update(turns)
        shape = len(read), max([1, *(len(ids) for ids, _, _ in read)])
        words, groups, mask = torch.zeros(2, *shape, dtype=torch.long).unbind() + (
            torch.zeros(shape, dtype=torch.bool),
        )
        positions = torch.full(shape, input_ids.shape[1] - 1)
        for row, (ids, where, numbers) in enumerate(read):
            words[row, : len(ids)], positions[row, : len(ids)] = torch.tensor(ids, dtype=torch.long), where
            groups[row, : len(ids)] = torch.tensor(numbers, dtype=torch.long)
            mask[row, : len(ids)] = True
        return Words(words, positions, mask, turn_ids.gather(1, positions), groups)

    def spell(self, words: Words, row: int, places: list[int], messages: list[dict]) -> list[str]:
        """The words at these places of a prompt, spelt as they are in its messages."""
        said, spelt, group = "\n".join(strings([m["content"] for m in messages])), [], None
        # Some word tokenizers leave out accents.
        plain = "".join(unicodedata.normalize("NFD", character)[0] for character in said)
        for place in places:
            if words.groups[row, place] != group:
                spelt.append([])
            group = words.groups[row, place]
            spelt[-1].append(words.ids[row, place])
        for i, ids in enumerate(spelt):
            text = self.word_tokenizer.decode(torch.stack(ids)).strip()
            pattern = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)", re.IGNORECASE)
            found = pattern.search(said) or pattern.search(plain)
            spelt[i] = said[slice(*found.span())] if found else text
        return spelt

    def _turn_ids(self, input_ids: torch.LongTensor, real: torch.BoolTensor) -> torch.LongTensor:
        """1 for the user's last turn, more for the turns before it, 0 for what follows: `(batch, tokens)`."""
        opens = torch.isin(input_ids, torch.tensor(self._openers, dtype=torch.long)) & real
        since = opens.flip(1).cumsum(1).flip(1) - opens.long()
        opening, tool = self._user_opening, self._tool_opening
        if not opening or len(opening) > input_ids.shape[1]:
            return since
        order = real.long().argsort(dim=1, stable=True)  # what goes on from a cache may have padding in the middle
        ids = input_ids.masked_fill(~real, -1).gather(1, order)
        found = (ids.unfold(1, len(opening), 1) == torch.tensor(opening)).all(-1)
        if tool:
            following = torch.nn.functional.pad(ids, (0, len(tool)), value=-1)[:, len(opening) :]
            found &= (following.unfold(1, len(tool), 1) != torch.tensor(tool)).any(-1)
        last = found.shape[1] - 1 - found.flip(1).long().argmax(1, keepdim=True)
        numbered = since - since.gather(1, order.gather(1, last)) + 1
        return torch.where(found.any(1, keepdim=True), numbered.clamp(min=0), since)

    def _read(self, tokens: tuple[int, ...]) -> tuple[list[int], torch.Tensor, list[str]]:
        """A turn's tokens to word pieces, and for each the place of the token in which it ends, and its word's key."""
        pieces = [self._pieces[i] if i < len(self._pieces) else b"" for i in tokens]
        text = b"".join(pieces).decode("utf-8", "surrogateescape")
        if not text.strip():  # a line end between two turns
            return [], torch.empty(0, dtype=torch.long), []
        # What is no character stays one place: a cut one, at an end of the text.
        readable = text if text.isascii() else re.sub("[\udc80-\udcff]", "\ufffd", text)
        encoding = self.word_tokenizer.backend_tokenizer.encode(readable, add_special_tokens=False)
        ends = torch.tensor([end for _, end in encoding.offsets], dtype=torch.long)  # in characters
        if not text.isascii():
            characters = torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32)
            widths = 1 + (characters >= 0x80).long() + (characters >= 0x800) + (characters >= 0x10000)
            widths[(characters >= 0xDC80) & (characters <= 0xDCFF)] = 1
            ends = widths.cumsum(0)[(ends - 1).clamp(min=0)]
        places = torch.searchsorted(torch.tensor([len(piece) for piece in pieces]).cumsum(0), ends)
        keys = _piece_keys(readable, encoding)
        return encoding.ids, places.clamp(max=len(tokens) - 1), keys


def _piece_keys(text: str, encoding) -> list[str]:
    """For each piece its word, in lower case and without the ending of a plural; "" if no search needs it."""
    spans: dict[int, tuple[int, int]] = {}
    for number, (start, end) in zip(encoding.word_ids, encoding.offsets, strict=True):
        spans[number] = (min(start, spans.get(number, (start, end))[0]), end)
    keys = {number: _stem(text[start:end].strip().lower()) for number, (start, end) in spans.items()}
    return [keys[number] for number in encoding.word_ids]


def word_keys(text: str) -> list[str]:
    """The words of a text as [`Words`] groups them."""
    return [_stem(word) for word in re.findall(r"\w+", text.lower())]


def _stem(word: str) -> str:
    if word in FUNCTION_WORDS or len(word) < 2 or not any(map(str.isalnum, word)):
        return ""
    if word.endswith("ies") and len(word) > 5:
        return word[:-3] + "y"
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    return word[:-2] if word.endswith(("sses", "shes", "ches", "xes", "zes")) else word[:-1]


def _any_of(tokens: list[str | None]) -> re.Pattern:
    return re.compile(
        "|".join(re.escape(token) for token in sorted(filter(None, tokens), key=len, reverse=True)) or "(?!)"
    )


def _spellings(tokenizer, tokens: list[str | None]) -> list[bytes]:
    """The bytes in a text, in UTF-8, that each token stands for; for some they are a part of a character."""
    tokens = [token or "" for token in tokens]
    if tokenizer.convert_tokens_to_string(["\u0120"]) == " ":  # GPT-2's spelling: a character for each byte
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        return [
            bytes(map(byte_of.get, token)) if all(map(byte_of.__contains__, token)) else token.encode()
            for token in tokens
        ]
    return [  # SentencePiece's
        bytes([int(token[3:5], 16)])
        if re.fullmatch("<0x[0-9A-F]{2}>", token)
        else token.replace("\u2581", " ").encode("utf-8", "surrogateescape")
        for token in tokens
    ]


NativeRetrievalProcessor.register_for_auto_class("AutoProcessor")
__all__ = ["NativeRetrievalProcessor", "as_conversations"]
