# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""A causal language model whose hidden states are search queries (after arXiv 2603.08429).

    messages ── chat template ──▶ prompt ── backbone prefill ──▶ hidden states ── head ──▶ query vector
                                                              └▶ KV cache ── generate ──▶ the same tokens as without us

The file reads in that order: messages to prompt, the two parts of the head, the model. It ships to the Hub beside
`configuration_native_retrieval.py` and imports torch and transformers only.
"""

import copy
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    __version__,
)
from transformers import initialization as init
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput, logging

try:  # from the Hub the two files form a package; in the repository they are plain modules
    from .configuration_native_retrieval import QUERY_MODES, NativeRetrievalConfig
except ImportError:
    from configuration_native_retrieval import QUERY_MODES, NativeRetrievalConfig

logger = logging.get_logger(__name__)

ROLES = ("system", "user", "assistant", "tool")
TEACHER_TOKENIZER = "teacher_tokenizer"  # a folder beside the weights
Message = dict[str, Any]
Conversation = list[Message]


# ---------------------------------------------------------------------------------------------------------------------
# Messages to prompt
# ---------------------------------------------------------------------------------------------------------------------


def check_messages(messages: Conversation, name: str = "conversation") -> None:
    """Raises `ValueError` in one line unless `messages` is a conversation that a query can be taken from."""
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"{name} is a {type(messages).__name__}; give a list of {{'role', 'content'}} messages")
    if not messages:
        raise ValueError(f"{name} is empty; give at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            # Never the text itself: it may be private, and errors end in logs.
            kind = "dict without a role" if isinstance(message, dict) else type(message).__name__
            raise ValueError(f"{name}, message {i}, is a {kind}, which is no message; give {{'role', 'content'}}")
        if message["role"] not in ROLES:
            raise ValueError(f"{name}, message {i}: unknown role {message['role']!r}; use one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) and not (
            message.get("content") is None and message.get("tool_calls")  # an agent that called a tool and said nothing
        ):
            kind = type(message.get("content")).__name__
            raise ValueError(f"{name}, message {i}: content is a {kind}; give a string")
    if messages[-1]["role"] == "user" and not _text(messages[-1]):
        raise ValueError(f"{name}: the last turn, message {len(messages) - 1}, is empty; give the user's question")
    if not any(_text(message) for message in messages if message["role"] != "system"):
        raise ValueError(f"{name} has no text in any turn; give at least one turn with text")


def _text(message: Message) -> str:
    return (message.get("content") or "").strip()


def merge_turns(messages: Conversation) -> Conversation:
    """Drops empty turns and joins neighbours of one role: real logs have both, and some chat templates refuse them."""
    merged: Conversation = []
    for message in messages:
        if not _text(message):
            continue
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1]["content"] += "\n" + message["content"]
        else:
            merged.append({"role": message["role"], "content": message["content"]})
    return merged


def _user_and_assistant_only(messages: Conversation) -> Conversation:
    """The same conversation for a chat template that knows neither `system` nor `tool`, as Gemma's."""
    folded = []
    for message in messages:
        if message["role"] == "tool":
            message = {"role": "user", "content": f"Tool result:\n{message['content']}"}
        folded.append(message if message["role"] == "assistant" else {**message, "role": "user"})
    if folded[0]["role"] == "assistant":
        folded.insert(0, {"role": "user", "content": "Hello."})
    return merge_turns(folded)


def _render(tokenizer, messages: Conversation) -> str:
    if not tokenizer.chat_template:
        text = "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in messages)
        return text[:-1] if messages[-1]["role"] == "assistant" else text + "Assistant:"
    half_turn = messages[-1]["role"] == "assistant"
    arguments = {"tokenize": False, "add_generation_prompt": not half_turn, "continue_final_message": half_turn}
    try:
        return tokenizer.apply_chat_template(messages, **arguments)
    except Exception as refused:  # templates refuse roles by raising whatever their author chose
        try:
            return tokenizer.apply_chat_template(_user_and_assistant_only(messages), **arguments)
        except Exception:
            # What the template's author wrote, and no other error's words: transformers' own quote the conversation.
            said = type(refused).__name__ == "TemplateError"
            reason = " ".join(str(refused).split()) if said else type(refused).__name__
            raise ValueError(f"the tokenizer's chat template refuses this conversation: {reason}") from None


def special_tokens_of(tokenizer) -> dict[int, str]:
    """The ids of the tokens that mark turns, with their spellings: a chat template writes them, and no text may."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    if tokenizer.chat_template:
        with suppress(ValueError):  # DeepSeek's markers of turns, for one, are not called special
            hello = {"content": "Hello."}
            prompt = _render(tokenizer, [{"role": role, **hello} for role in ("user", "assistant", "user")])
            written = {i for i in tokenizer(prompt, add_special_tokens=False)["input_ids"] if i in added}
            ids |= {i for i in written if re.search(r"[^\w\s]", added[i].content)}
    ids = sorted(ids)
    return dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))


def plain_text(text: str, special_tokens: Iterable[str]) -> str:
    """A text that a tokenizer reads as text throughout, whatever special tokens are spelt out in it."""
    for token in special_tokens:
        if len(token) > 1 and token in text:  # a word joiner inside the marker keeps it readable and harmless
            text = text.replace(token, token[0] + "\u2060" + token[1:])
    return text


def user_turn(tokenizer) -> tuple[list[int], int, list[int]]:
    """
    How a chat template opens a user's turn, from its special token on; how many special tokens it writes between the
    text of the last one and the assistant's answer; and what follows the same opening where it is a tool's turn, as Qwen's
    is. `([], 0, [])` where nothing tells a user's turn.
    """
    special = special_tokens_of(tokenizer)
    other, opened, behind = _around_turn(tokenizer, "user")
    starts = (
        i for i in reversed(range(len(opened))) if opened[i] in special and opened[i:] != other[i - len(opened) :]
    )
    opening = opened[next(starts, len(opened)) :]
    if not opening:
        return [], 0, []
    _, called, _ = _around_turn(tokenizer, "tool")
    tool: list[int] = []
    for start in range(len(called) - len(opening) + 1):
        if called[start : start + len(opening)] == opening:
            tool = called[start + len(opening) :]
    if tool and tool[-1] not in getattr(tokenizer, "added_tokens_decoder", {}):
        tool = tool[:-1]  # in a prompt it may be one token with what follows
    return opening, sum(i in special for i in behind), tool if tokenizer.decode(tool).strip() else []


def _around_turn(tokenizer, role: str) -> tuple[list[int], list[int], list[int]]:
    """What a chat template writes before an answer, between it and a turn of this role, and behind that turn."""
    text, answer = "zyxwvu", "utsrqp"
    turns = [("user", "Hello."), ("assistant", answer), (role, text)]
    with suppress(ValueError):  # a template that refuses this will say so of the conversation at hand
        prompt = _render(tokenizer, [{"role": role, "content": content} for role, content in turns])
        if prompt.count(text) == prompt.count(answer) == 1:
            parts = (part.rstrip() for part in re.split(f"{answer}|{text}", prompt))
            other, between, behind = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
            return other, between, behind
    return [], [], []


def build_prompt(
    tokenizer, messages: Conversation, max_tokens: int, special_tokens: Iterable[str] | None = None
) -> list[int]:
    """
    One conversation to the token ids of its prompt, ending where the assistant would speak next.

    The conversation may end on any role. When it is longer than `max_tokens`, the oldest turns are dropped, a tenth of
    them at a time; a system message stays, and so does the last turn. Special tokens spelt out in a message's text become plain
    text, so that nothing a user or a document says can forge a turn; by default all that the tokenizer has.

    Returns:
        `list[int]`: at most `max_tokens` ids.

    Raises:
        `ValueError`: for a malformed conversation, or a last turn which is longer than `max_tokens`, by itself or with the
            system message.
    """
    check_messages(messages)
    messages = merge_turns(messages)
    special_tokens = special_tokens_of(tokenizer).values() if special_tokens is None else special_tokens
    for message in messages:
        message["content"] = plain_text(message["content"], special_tokens)
    oldest = 1 if messages[0]["role"] == "system" else 0
    while True:
        prompt = _render(tokenizer, messages)
        # Templates write their own special tokens; a tokenizer's default ones would stand there twice.
        input_ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        if len(input_ids) <= max_tokens:
            return input_ids
        if len(messages) - oldest <= 1:
            kept = "the system message and the last turn make" if oldest else "the last turn alone makes"
            raise ValueError(
                f"{kept} a prompt of {len(input_ids)} tokens, over max_prompt_tokens={max_tokens}; "
                "shorten it, or raise the limit: --max_prompt_tokens of train.py, or in a trained model's config.json"
            )
        # Dropping a tenth at a time keeps a very long history from being rendered once for every turn in it.
        drop = max(1, (len(messages) - oldest - 1) // 10)
        del messages[oldest : oldest + drop]


def _spellings(tokenizer, tokens: list[str | None]) -> list[bytes]:
    """What each of a tokenizer's tokens stands for in a text, in UTF-8; of some it is a part of a character."""
    if tokenizer.convert_tokens_to_string(["\u0120"]) == " ":  # GPT-2's spelling: a character for each byte
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        return [
            bytes(map(byte_of.get, token)) if all(map(byte_of.__contains__, token)) else token.encode()
            for token in (token or "" for token in tokens)
        ]
    return [  # SentencePiece's
        bytes([int(token[3:5], 16)])
        if re.fullmatch("<0x[0-9A-F]{2}>", token)
        else token.replace("\u2581", " ").encode("utf-8", "surrogateescape")
        for token in (token or "" for token in tokens)
    ]


def _read_in(tokenizer, tokens: list[bytes]) -> tuple[list[int], torch.Tensor]:
    """
    A text, given as the spellings of one tokenizer's tokens, in another tokenizer's: their ids, and for each the place of
    the token in which it ends.
    """
    text = b"".join(tokens).decode("utf-8", "surrogateescape")
    encoding = tokenizer.backend_tokenizer.encode(
        # What is no character stays one place: a cut one, at an end of the text.
        text if text.isascii() else re.sub("[\udc80-\udcff]", "\ufffd", text),
        add_special_tokens=False,
    )
    ends = torch.tensor([end for _, end in encoding.offsets], dtype=torch.long)  # in characters
    if not text.isascii():
        characters = torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32)
        widths = 1 + (characters >= 0x80).long() + (characters >= 0x800) + (characters >= 0x10000)
        widths[(characters >= 0xDC80) & (characters <= 0xDCFF)] = 1
        ends = widths.cumsum(0)[(ends - 1).clamp(min=0)]
    places = torch.searchsorted(torch.tensor([len(token) for token in tokens]).cumsum(0), ends)
    return encoding.ids, places.clamp(max=len(tokens) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------------------------------


class ZeroInitLinear(nn.Linear):
    """
    A linear layer that starts at zero, so that training begins from what stands beside it.

    Its output is divided by its width (as in muP, arXiv 2203.03466): Adam moves every weight by the learning rate, and
    thousands of them that agree would drown a unit vector in the first step.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states / self.in_features, self.weight, self.bias)


class ProjectionHead(nn.Module):
    """
    The paper's head, over several layers: linear in, learned positions, transformer encoder, masked mean, linear out;
    beside it a linear skip path, which alone would be a linear probe.

    Positions count from the end, so that the newest token always has the same one.
    """

    def __init__(self, config: NativeRetrievalConfig, starts_at_zero: bool):
        super().__init__()
        hidden_size = config.text_config.get_text_config().hidden_size
        num_layers = len(config.hidden_state_layers)
        self.num_positions = max(config.num_context_tokens, config.max_query_tokens)
        # Without scale and shift, which would be one with the maps behind it: so the layers' norms are one operation.
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.linear_in = nn.Linear(num_layers * hidden_size, config.head_dim)
        self.positions = nn.Embedding(self.num_positions, config.head_dim)
        self.dropout = nn.Dropout(config.head_dropout)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.head_dim,
                config.head_num_attention_heads,
                dim_feedforward=2 * config.head_dim,
                dropout=config.head_dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.head_num_layers)
        )
        self.norm_out = nn.LayerNorm(config.head_dim)
        linear_out = ZeroInitLinear if starts_at_zero else nn.Linear
        self.linear_out = linear_out(config.head_dim, config.embedding_dim)
        self.skip = ZeroInitLinear(2 * num_layers * hidden_size, config.embedding_dim) if config.head_skip else None

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, layers, hidden_size)`): in order, newest last.
            mask (`torch.BoolTensor` of shape `(batch, tokens)`): False for padding; at least one True in each row.

        Returns:
            the vector, not yet normalised, `(batch, embedding_dim)`, and a summary of what was read,
            `(batch, 2 * head_dim)`: the mean over the tokens beside the newest token.
        """
        states = self.norm(hidden_states).flatten(2)
        from_end = mask.flip(1).cumsum(1).flip(1) - 1
        encoded = self.linear_in(states) + self.positions(from_end.clamp(0, self.num_positions - 1))
        encoded = self.dropout(encoded)
        for layer in self.encoder:
            encoded = layer(encoded, src_key_padding_mask=~mask)
        encoded = self.norm_out(encoded)
        mean, newest = _mean_and_newest(encoded, mask)
        vectors = self.linear_out(mean)
        if self.skip is not None:
            vectors = vectors + self.skip(self.dropout(torch.cat(_mean_and_newest(states, mask), dim=-1)))
        return vectors, torch.cat((mean, newest), dim=-1)


def _mean_and_newest(states: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = mask.to(states.dtype)
    mean = ((weights / weights.sum(1, keepdim=True))[:, None] @ states).squeeze(1)
    newest = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return mean, states[torch.arange(len(states), device=states.device), newest]


class HistoryRepulsion(nn.Module):
    """
    An agent searches for what has not been said yet, and what has been said is often a document of the same index: near
    the question, and no answer to it. This turns a query vector away from earlier turns, as far as it lies nearer to them
    than a threshold. Which turns these are is learned, from their states and from what the head makes of the question.

    It is the ridge regression of that excess on the turns' vectors, so that what several turns share, the topic, is not
    taken away once for each of them. (Maximal marginal relevance, Carbonell and Goldstein 1998, in the query itself.)
    """

    # A gate is to open or close within an epoch: no sooner, or it is shut for good before the head knows what to ask.
    GATE_SCALE = 50.0

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__()
        self.turn_gate = ZeroInitLinear(config.text_config.get_text_config().hidden_size, 1)
        self.question_gate = ZeroInitLinear(2 * config.head_dim, 1, bias=False)
        self.threshold = nn.Parameter(torch.empty(1))  # FSDP2 takes no scalars
        self.log_ridge = nn.Parameter(torch.empty(1))

    def forward(
        self, vectors: torch.Tensor, summary: torch.Tensor, turn_words: torch.Tensor, turn_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            vectors, summary (`(batch, embedding_dim)`, `(batch, 2 * head_dim)`): of the question.
            turn_words, turn_states (`(batch, turns, embedding_dim)`, `(batch, turns, hidden_size)`): sums over each turn's
                tokens, of any scale; 0 for a turn that is not there.

        Returns:
            the vectors, `(batch, embedding_dim)`, and how much of each turn's words was taken away, `(batch, turns)`.
        """
        length = vectors.norm(dim=-1, keepdim=True)
        turn_length = turn_words.norm(dim=-1).clamp(min=1e-6)
        turn_states = F.layer_norm(turn_states, turn_states.shape[-1:])
        gate = (self.turn_gate(turn_states).squeeze(-1) + self.question_gate(summary.float())) * self.GATE_SCALE
        gate = gate.sigmoid()
        turns = (gate / turn_length)[..., None] * turn_words
        excess = F.relu((turns @ vectors[..., None]).squeeze(-1) - gate * self.threshold * length)
        ridge = self.log_ridge.exp() * torch.eye(turns.shape[1], device=turns.device)
        away = torch.linalg.solve(turns @ turns.mT + ridge, excess)
        return vectors - (away[:, None] @ turns).squeeze(1), away * gate / turn_length


class Antecedents(nn.Module):
    """
    What the last question refers to: each of its words looks for words of the turns before. The newest tokens, which the
    copy path's other heads ask from, have read the question as a whole; "they" or "that album" knows best whom it means.

    A word may also find nothing, and how much each one's finding counts is learned.
    """

    NUM_WORDS = 24  # of the question, the newest

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__()
        hidden_size = config.text_config.get_text_config().hidden_size
        heads, width = config.copy_num_heads, config.copy_head_dim
        self.query = nn.Linear(hidden_size, heads * width)
        self.key = nn.Parameter(torch.empty(heads, width, hidden_size))
        self.share = nn.Linear(hidden_size, heads)
        self.nothing = nn.Parameter(torch.empty(heads))
        self.dropout = nn.Dropout(config.head_dropout)

    def forward(
        self,
        states: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        places: torch.Tensor,
        mask: torch.Tensor,
        segments: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            states, places, mask, segments: as of [`CopyPath`].
            scale (`(batch, tokens)`): what makes each state one of root mean square 1.
            bias (`(batch, heads, words)`): what is added to every word's score.

        Returns:
            the weight of each word of the turns before the last question, `(batch, heads, words)`, at most 1 in sum.
        """
        batch, num_words = places.shape
        heads, width, _ = self.key.shape
        mask = mask & (segments > 0)  # 0: what an agent has done since
        last = segments.masked_fill(~mask, CopyPath.NUM_SEGMENTS).amin(1, keepdim=True)
        earlier = mask & (segments > last)
        asking = (mask & (segments == last)) * torch.arange(1, num_words + 1, device=places.device)
        longest = int((asking > 0).sum(1).amax())
        asking, order = asking.topk(min(max(longest, 1), self.NUM_WORDS), dim=1)
        at, rows = places.gather(1, order), torch.arange(batch, device=places.device)[:, None]
        question = (states[rows, at] * scale[rows, at][..., None]).to(self.query.weight.dtype)

        queries = self.dropout(self.query(question).float()).view(batch, -1, heads, width).transpose(1, 2)
        queries = queries @ self.key * width**-0.5
        scores = (queries.flatten(1, 2) @ states.mT).view(batch, heads, -1, states.shape[1]) * scale[:, None, None]
        scores = scores.gather(3, places[:, None, None].expand(-1, heads, scores.shape[2], -1)) + bias[:, :, None]
        low = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~earlier[:, None, None], low)
        nothing = self.nothing[:, None, None].expand(batch, -1, scores.shape[2], 1)
        found = torch.cat((scores, CopyPath.BIAS_SCALE * nothing), dim=-1).softmax(-1)[..., :-1]
        shares = self.share(question).float().mT.masked_fill((asking == 0)[:, None], low).softmax(-1)
        return (shares[:, :, None] @ found).squeeze(2)


class CopyPath(nn.Module):
    """
    What a language model's deep states lose is which words were said. This path attends over the conversation, decides
    which of its words belong in the query, and adds their values: a learned vector for each token, in the teacher's space,
    plus a projection of the language model's state there, which knows the name that its pieces spell.

    The tokens are the teacher's own, if it has a tokenizer: it knows a rare name by the pieces that it spells it with.

    Neither keys nor values are formed for each token, nor its state's norm: linear maps and a scale commute with the
    weighted sum, so the query is moved into the states' space, and the sum is moved out of it. The cost is one product with
    the states for each head, and one for each turn.
    """

    NUM_SEGMENTS = 64
    BIAS_SCALE = 20.0  # the biases are logits: at a head's learning rate they would hardly move by one in an epoch
    TOPIC_DECAY = 0.6  # of a turn's words, with each special token that lies between: two or three a turn

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__()
        text = config.text_config.get_text_config()
        heads, width = config.copy_num_heads, config.copy_head_dim
        self.num_heads = heads
        self.query = nn.Linear(2 * config.head_dim, heads * width)
        self.key = nn.Parameter(torch.empty(heads, width, text.hidden_size))
        self.segment_bias = nn.Embedding(self.NUM_SEGMENTS, heads)
        self.topic_threshold = nn.Parameter(torch.empty(heads))
        self.topic_slope = nn.Parameter(torch.empty(heads))
        vocab_size = config.copy_vocab_size or text.vocab_size
        self.token_values = nn.Embedding(vocab_size, config.embedding_dim)
        self.token_salience = nn.Embedding(vocab_size, 1)
        self.antecedents = Antecedents(config)
        self.gain = nn.Parameter(torch.empty(2 * heads))
        self.state_value = ZeroInitLinear(heads * text.hidden_size, config.embedding_dim, bias=False)
        self.antecedent_value = nn.Parameter(torch.empty(heads, text.hidden_size, width))
        self.antecedent_output = ZeroInitLinear(heads * width, config.embedding_dim, bias=False)
        self.novelty = HistoryRepulsion(config)
        self.dropout = nn.Dropout(config.head_dropout)

    def forward(
        self,
        vectors: torch.Tensor,
        summary: torch.Tensor,
        states: torch.Tensor,
        input_ids: torch.Tensor,
        places: torch.Tensor,
        mask: torch.Tensor,
        segments: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            vectors, summary (`(batch, embedding_dim)`, `(batch, 2 * head_dim)`): from the projection head; the summary
                asks for words, and these are added to the vectors.
            states (`torch.Tensor` of shape `(batch, tokens, hidden_size)`): of the prompt, at `copy_layer`.
            input_ids, places, mask, segments (`(batch, words)`): the tokens to copy from, in order, the prompt's token in
                which each ends, which of them may be copied, and how many special tokens of the prompt follow each, which
                tells the turns apart.

        Returns:
            the vectors `(batch, embedding_dim)`, and the weight of each of the prompt's tokens in them `(batch, tokens)`:
            below 0, they are turned away from it.
        """
        batch, segments = len(states), segments.clamp(max=self.NUM_SEGMENTS - 1)
        count = int(segments.max()) + 1
        turns = count - 1 - segments
        scale = self._scale(states)
        queries = self.query(summary).view(batch, self.num_heads, 1, -1).float()
        queries = self.dropout(queries @ self.key).squeeze(2) * self.key.shape[1] ** -0.5
        scores = queries @ states.mT * scale[:, None]
        scores = scores.gather(2, places[:, None].expand(-1, self.num_heads, -1))
        salience = self.BIAS_SCALE * self.token_salience(input_ids).squeeze(-1)

        # Each turn by itself, its words weighted as in `words`. Turns stand in order, so these are a bag of neighbours.
        shares = salience.masked_fill(~mask, torch.finfo(salience.dtype).min)
        shares = (shares - shares.amax(1, keepdim=True)).exp() * mask
        rows = count * torch.arange(batch, device=turns.device)[:, None]
        starts = torch.searchsorted(
            (turns + rows).flatten(), (rows + torch.arange(count, device=turns.device)).flatten()
        )
        turn_words = F.embedding_bag(
            input_ids.flatten(), self.token_values.weight, starts, per_sample_weights=shares.flatten(), mode="sum"
        ).view(batch, count, -1)

        off_topic = F.relu(self.topic_threshold[:, None] - self._relatedness(turn_words)[:, None])
        bias = self.segment_bias.weight[:count].flip(0).T - self.topic_slope[:, None] * off_topic
        bias = self.BIAS_SCALE * bias.gather(2, turns[:, None].expand_as(scores))
        bias = salience[:, None] + bias
        scores = scores + bias
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        # A row with nothing to copy would otherwise spread its weight over padding.
        weights = scores.softmax(-1) * mask.any(1)[:, None, None]
        antecedents = self.antecedents(states, scale, bias.detach(), places, mask, segments)
        weights = torch.cat((weights, antecedents), dim=1)
        copied = self.gain @ weights

        # The sums of states: the heads' over all tokens, and each turn's over its own, no two of which have any in common.
        tokens = states.shape[1]
        weights = weights.new_zeros(batch, len(self.gain), tokens).scatter_add(
            2, places[:, None].expand_as(weights), weights
        )
        mixed = self.dropout(weights * scale[:, None] @ states).to(self.state_value.weight.dtype)
        turn_states = F.embedding_bag(
            (places + tokens * torch.arange(batch, device=places.device)[:, None]).flatten(),
            states.flatten(0, 1),
            starts,
            per_sample_weights=(shares * scale.gather(1, places)).flatten(),
            mode="sum",
        ).view(batch, count, -1)
        vectors = vectors + self._sum_of_values(input_ids, copied)
        vectors = vectors + self.state_value(mixed[:, : self.num_heads].flatten(1))
        values = torch.einsum("bnh,nhd->bnd", mixed[:, self.num_heads :], self.antecedent_value)
        vectors = vectors + self.antecedent_output(values.flatten(1))

        vectors, away = self.novelty(vectors, summary, turn_words, turn_states)
        return vectors, (self.gain @ weights).scatter_add(1, places, -away.gather(1, turns) * shares)

    @classmethod
    def _relatedness(cls, turn_words: torch.Tensor) -> torch.Tensor:
        """
        How near each turn, read with its neighbours, is to the last question read with its own: a cosine, `(batch, turns)`.
        Numbers alone cannot tell a far turn of this topic from a near one of another.
        """
        words = turn_words.detach().clone()
        words[:, -1] = 0  # what an agent has said and called since
        number = torch.arange(words.shape[1], device=words.device)
        blurred = F.normalize(cls.TOPIC_DECAY ** (number[:, None] - number).abs() @ words, dim=-1)
        return (blurred @ blurred[:, -1, :, None]).squeeze(-1)

    @staticmethod
    def _scale(states: torch.Tensor) -> torch.Tensor:
        """What makes each state one of root mean square 1: `(batch, tokens)`."""
        return (torch.linalg.vector_norm(states, dim=-1).square() / states.shape[-1] + 1e-6).rsqrt()

    def _sum_of_values(self, input_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(input_ids, self.token_values.weight, per_sample_weights=weights, mode="sum")

    def words(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        The sum of token values that every head starts from, weighted by salience alone: `(batch, embedding_dim)`.

        It needs no backbone, so it can be trained on a hundred thousand texts in minutes.
        """
        scores = self.BIAS_SCALE * self.token_salience(input_ids).squeeze(-1)
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
        return self._sum_of_values(input_ids, weights)


class Probe(nn.Module):
    """
    Learned tokens that ask the backbone for a query, behind any prompt: their embeddings, a low-rank adapter (LoRA, arXiv
    2106.09685) in some of the backbone's layers that acts on them alone, and a small head that reads their states.

    Everything here is added to what the context gives, and starts at zero: an untrained probe changes nothing.
    """

    ADAPTER_SCALE = 2.0

    def __init__(self, config: NativeRetrievalConfig, backbone: PreTrainedModel):
        super().__init__()
        text = config.text_config.get_text_config()
        self.embeddings = nn.Parameter(torch.empty(config.num_probe_tokens, text.hidden_size))
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in _adapted_layers(config, backbone):
            # Conv1D, GPT-2's linear layer, keeps its weight the other way round.
            # A quantised layer's weight is packed, and tells no width.
            widths = layer.weight.shape if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
            width_in, width_out = widths
            self.down[name] = nn.Parameter(torch.empty(config.adapter_rank, width_in))
            self.up[name] = nn.Parameter(torch.empty(width_out, config.adapter_rank))
        self.norm = nn.LayerNorm(text.hidden_size, elementwise_affine=False)
        self.linear_in = nn.Linear(2 * len(config.hidden_state_layers) * text.hidden_size, config.head_dim)
        self.linear_out = ZeroInitLinear(config.head_dim, config.embedding_dim)
        self.summary = ZeroInitLinear(config.head_dim, 2 * config.head_dim)

    def read(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        States `(batch, num_probe_tokens, layers, hidden_size)` to what they add to the vector and to the summary of the
        context, `(batch, embedding_dim)` and `(batch, 2 * head_dim)`.
        """
        states = self.norm(states.to(self.linear_in.weight.dtype)).flatten(2)
        read = F.gelu(self.linear_in(torch.cat((states.mean(1), states[:, -1]), dim=-1)))
        return self.linear_out(read), self.summary(read)

    def adapt(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the output of the linear layer of this name."""
        inner = F.linear(inputs.to(self.down[name]), self.down[name])
        return F.linear(self.ADAPTER_SCALE * inner, self.up[name])


def _adapted_layers(config: NativeRetrievalConfig, backbone: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The linear maps in the last `adapter_num_layers` of the layers that are read."""
    last = max(config.hidden_state_layers)
    adapted = range(last - config.adapter_num_layers, last)
    layers = []
    for name, module in backbone.base_model.named_modules():
        number = re.search(r"\.(\d+)\.", name)  # of the block, in layers.7.mlp.up_proj or h.7.attn.c_attn
        if isinstance(module, (nn.Linear, Conv1D)) and number and int(number[1]) in adapted:
            layers.append((name.replace(".", "-"), module))
    return layers


def _tokenizer_fingerprint(tokenizer) -> str:
    """Tells another vocabulary, other special tokens and another chat template."""
    spelt = tokenizer("The 3rd café opened in 1974;\n\tdef f(x): return x  # 東京", add_special_tokens=True)[
        "input_ids"
    ]
    parts = [len(tokenizer), spelt, sorted(tokenizer.all_special_tokens), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


# The probe whose tokens are passing through the backbone in this very call. Not a state of any module: another thread
# that generates with the same backbone sees None (peft's switch for its adapters is a state of the modules).
_PASSING: ContextVar[Probe | None] = ContextVar("passing_probe", default=None)


def _add_adapter(name: str, layer: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
    probe = _PASSING.get()
    return None if probe is None else output + probe.adapt(name, inputs[0]).to(output)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def processor_has_bfloat16() -> bool:
    """Whether the CPU computes in bfloat16; many do not, and are then five times as fast in float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _float32_is_faster() -> bool:
    return not torch.accelerator.is_available() and not processor_has_bfloat16()


@dataclass
class NativeRetrievalOutput(ModelOutput):
    """
    query_embeddings (`torch.FloatTensor` of shape `(batch, embedding_dim)`): L2-normalised, in the teacher's space.
    attributions (`torch.FloatTensor` of shape `(batch, tokens)`, *optional*): each token's weight in the copy path.
    input_ids, attention_mask (`(batch, tokens)`): what the vectors were read from, padded on the left.
    past_key_values (`Cache`, *optional*): the prompt's cache, to go on generating from.
    query_ids (`list[list[int]]`, *optional*): in `generated` mode, the query that was written.
    """

    query_embeddings: torch.FloatTensor | None = None
    attributions: torch.FloatTensor | None = None
    input_ids: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    past_key_values: Any = None
    query_ids: list[list[int]] | None = None


class QueryCache(DynamicCache):
    """
    A KV cache that also keeps what the head reads: the tokens that passed and their states at `hidden_state_layers`.

    Whatever passes through the backbone with it is recorded, a generation's tokens included, so that a vector can be
    taken at any point without a second pass. It grows by a quarter for that.
    """

    def __init__(self, config: NativeRetrievalConfig):
        super().__init__(config=config.text_config)
        self.hidden_state_layers = config.hidden_state_layers
        self.activate_past_recording()  # sliding windows could not be cropped otherwise
        self.turns: dict = {}  # what [`NativeRetrievalModel.words_of`] has read of the conversation
        self._padding: torch.Tensor | None = None  # the mask of the tokens up to the last prefill; later ones are real
        self._given: torch.Tensor | None = None  # the same of the batch as its owner lays it out
        self._recorded: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._keeps = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        if self._keeps:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return copy.copy(self.layers[layer_idx]).update(key_states, value_states, *args, **kwargs)

    def record(self, input_ids: torch.Tensor, hidden_states: torch.Tensor) -> None:
        self._recorded.append((input_ids, hidden_states))

    def recorded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, mask `(batch, tokens)` and states `(batch, tokens, layers, hidden_size)` of all that passed."""
        if len({len(ids) for ids, _ in self._recorded}) != 1:
            raise ValueError("this cache has passed through beam search or another batch; take the vector before that")
        input_ids, hidden_states = (torch.cat(parts, dim=1) for parts in zip(*self._recorded, strict=True))
        self._recorded = [(input_ids, hidden_states)]
        generated = input_ids.shape[1] - self._padding.shape[1]
        return input_ids, F.pad(self._padding, (0, generated), value=1), hidden_states

    def cut(self, mask: torch.Tensor) -> bool:
        """
        Forgets what follows the `mask` `(batch, tokens)`, and hides what it hides. False, and nothing is done, if that
        cannot be: a sliding window has dropped what would be needed now, or would count what is hidden; a recurrent
        state has taken in what is to be forgotten; or a pass was interrupted half way.
        """
        input_ids, padding, _ = self.recorded()
        tokens, passed = mask.shape[1], input_ids.shape[1]
        if self.get_seq_length() != passed:
            return False
        if any(map(_is_recurrent, self.layers)) and not torch.equal(mask, padding):
            return False
        holes = bool(((mask == 0) & (mask.cumsum(1) > 0)).any())
        for layer in self.layers:
            if getattr(layer, "is_sliding", False) and (
                holes or layer.keys.shape[-2] - (passed - tokens) < min(layer.sliding_window - 1, tokens)
            ):
                return False
        if tokens < passed:
            self.activate_past_recording()  # some ways to generate switch it off, and windows refuse to be cropped then
            self.crop(tokens - passed)
        self._padding = mask
        return True

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        rest = -tokens_to_remove
        while rest > 0 and self._recorded:
            input_ids, hidden_states = self._recorded.pop()
            if input_ids.shape[1] > rest:
                self._recorded.append((input_ids[:, :-rest], hidden_states[:, :-rest]))
            rest -= input_ids.shape[1]

    def branch(self, keeps: bool = True) -> "QueryCache":
        """
        A cache to go on from without changing this one: layers replace their tensors, and but for recurrent ones never write
        into them. One that does not keep what passes serves a single pass, in which each layer is done with its memory
        before the next.
        """
        branch = copy.copy(self)
        branch.layers = [copy.deepcopy(layer) if _is_recurrent(layer) else copy.copy(layer) for layer in self.layers]
        branch._recorded = list(self._recorded)
        branch._keeps = keeps
        return branch


def _is_recurrent(layer) -> bool:
    """Whether a cache's layer is, wholly or in part, of linear attention: a state that each token changes."""
    return hasattr(layer, "recurrent_states")


def _stacked(states: tuple[torch.Tensor, ...], layers: list[int]) -> torch.Tensor:
    """Some layers' states, `(batch, tokens, layers, hidden_size)`; of a backbone on several devices, on the first."""
    return torch.stack([states[i].to(states[0].device) for i in layers], dim=2)


def _keep_states(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if isinstance(kwargs.get("past_key_values"), QueryCache):
        kwargs["output_hidden_states"] = True
    return args, kwargs


def _record_states(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, QueryCache):
        hidden_states = _stacked(output.hidden_states, cache.hidden_state_layers)
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:  # a probe's embeddings are no tokens
            input_ids = torch.full(hidden_states.shape[:2], -1, device=hidden_states.device)
        cache.record(input_ids, hidden_states)


@dataclass
class Prefill(ModelOutput):
    """A batch of prompts after one pass through the backbone: everything that either head or generation needs."""

    input_ids: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None
    hidden_states: torch.FloatTensor | None = None  # (batch, tokens, layers, hidden_size)
    past_key_values: Any = None


class NativeRetrievalModel(PreTrainedModel):
    """
    A causal language model and a head that turns its hidden states into query vectors for an existing index.

    `generate` is the backbone's own: its weights are frozen and nothing here touches them.

    Example:

    ```python
    model = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True)
    vector = model.embed_query([{"role": "user", "content": "Who wrote Dune?"}])  # (1, embedding_dim)
    ```
    """

    config_class = NativeRetrievalConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The head's time is that of reading its weights, once, so its large maps take the backbone's precision. What the copy
    # path adds up stays in full precision.
    _keep_in_fp32_modules_strict = [
        f"copy_path.{name}"
        for name in (
            "key",
            "antecedents.key",
            "antecedents.nothing",
            "segment_bias",
            "topic_threshold",
            "topic_slope",
            "token_values",
            "token_salience",
            "gain",
            "novelty",
        )
    ]

    def __init__(self, config: NativeRetrievalConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        given = backbone is not None
        if not given:
            backbone = AutoModelForCausalLM.from_config(config.text_config)
        if given or not config.store_backbone:
            for module in backbone.modules():  # its weights are real, or come later: none are to be drawn anew
                module._is_hf_initialized = True
        self.backbone = backbone.requires_grad_(False).eval()
        # Beside a copy path, training starts from the words and learns what to add to them.
        self.head = ProjectionHead(config, starts_at_zero=config.copy_num_heads > 0)
        self.copy_path = CopyPath(config) if config.copy_num_heads else None
        self.probe = Probe(config, backbone) if config.num_probe_tokens else None
        self._hook_backbone()
        if not config.store_backbone:
            self._keys_to_ignore_on_load_missing = [r"^backbone\."]
        self._stored_dtype: torch.dtype | None = None  # of a backbone that computes in float32 instead
        self._tokenizer = self._teacher_tokenizer = None
        self._tokenizer_source: tuple[str, dict] | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Module by module: transformers passes over a custom module that has no parameters of its own.
        if isinstance(module, ZeroInitLinear):
            init.zeros_(module.weight)
        elif isinstance(module, CopyPath):
            init.normal_(module.key, std=0.02)
            init.normal_(module.antecedent_value, std=module.antecedent_value.shape[1] ** -0.5)
            gains = torch.tensor([1.0, 0.5]) / module.num_heads  # antecedents have the words beside them
            init.copy_(module.gain, gains.repeat_interleave(module.num_heads))
            init.zeros_(module.segment_bias.weight)
            init.constant_(module.topic_threshold, 0.6)
            init.constant_(module.topic_slope, 0.4)
            init.zeros_(module.token_salience.weight)
        elif isinstance(module, Antecedents):
            init.normal_(module.key, std=0.02)
            init.zeros_(module.nothing)
        elif isinstance(module, HistoryRepulsion):
            init.zeros_(module.turn_gate.bias)  # half open
            init.constant_(module.threshold, 0.45)
            init.constant_(module.log_ridge, -1.0)
        elif isinstance(module, Probe):
            init.normal_(module.embeddings, std=0.02)
            for name in module.down:
                init.normal_(module.down[name], std=module.down[name].shape[1] ** -0.5)
                init.zeros_(module.up[name])

    def _hook_backbone(self) -> None:
        """
        Hooks that let a `QueryCache` record, and others on the linear layers that do nothing but while a probe's tokens
        pass through.
        """
        base = self.backbone.base_model
        if _keep_states not in base._forward_pre_hooks.values():
            base.register_forward_pre_hook(_keep_states, with_kwargs=True)
            base.register_forward_hook(_record_states, with_kwargs=True)
        if self.probe is None:
            return
        for name, layer in _adapted_layers(self.config, self.backbone):
            hooks = layer._forward_hooks.values()
            if not any(isinstance(hook, partial) and hook.func is _add_adapter for hook in hooks):
                layer.register_forward_hook(partial(_add_adapter, name))

    @classmethod
    def from_backbone(
        cls, backbone: str | PreTrainedModel, teacher: Any = None, *, tokenizer: Any = None, **config_fields
    ) -> "NativeRetrievalModel":
        """
        A new, untrained model around an existing language model.

        Args:
            backbone (`str` or `PreTrainedModel`): a causal language model, or its path or Hub id.
            teacher (*optional*): the embedding model of the index. Anything with
                `encode(list[str]) -> array (n, embedding_dim)`, such as a `SentenceTransformer`; its vectors of single
                tokens start the copy path: of its own `tokenizer`'s, if it has a fast one, and else of the backbone's.
                Without it, set `embedding_dim`.
            tokenizer (*optional*): the backbone's; loaded from beside it by default.
            **config_fields: fields of [`NativeRetrievalConfig`], `backbone_revision` among them.

        Raises:
            `ValueError`: for a tokenizer larger than the backbone's embeddings, or a bad field.
        """
        known, stored_dtype = {field.name for field in fields(NativeRetrievalConfig)}, None
        for name in config_fields:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else "see NativeRetrievalConfig"
                raise ValueError(f"NativeRetrievalConfig has no field {name!r}; {hint}")
        if isinstance(backbone, (str, os.PathLike)):
            source = str(backbone)
            revision = config_fields.get("backbone_revision")
            try:
                backbone = AutoModelForCausalLM.from_pretrained(source, revision=revision)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise OSError(f"backbone {source!r} (revision {revision}) cannot be loaded: {reason}") from error
            config_fields.setdefault("backbone_name_or_path", source)
            halves = {weight.dtype for weight in backbone.parameters()} <= {torch.bfloat16, torch.float16}
            if halves and getattr(backbone, "hf_quantizer", None) is None and _float32_is_faster():
                stored_dtype, backbone = backbone.dtype, backbone.float()
        else:
            source = backbone.name_or_path
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=config_fields.get("backbone_revision"))
        if len(tokenizer) > backbone.config.get_text_config().vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, the backbone embeds only "
                f"{backbone.config.get_text_config().vocab_size}; give the backbone's own tokenizer"
            )
        teacher_tokenizer = getattr(teacher, "tokenizer", None)
        teacher_tokenizer = getattr(teacher_tokenizer, "backend_tokenizer", teacher_tokenizer)
        if hasattr(teacher_tokenizer, "no_truncation"):
            teacher_tokenizer = copy.deepcopy(teacher_tokenizer)  # a conversation is longer than what a teacher reads
            teacher_tokenizer.no_truncation()
            teacher_tokenizer.no_padding()
            teacher_tokenizer = PreTrainedTokenizerFast(tokenizer_object=teacher_tokenizer)
            config_fields["copy_vocab_size"] = len(teacher_tokenizer)
        else:
            teacher_tokenizer = None
        if teacher is not None:
            copied = teacher_tokenizer or tokenizer
            # WordPiece marks the inside of a word.
            spellings = [copied.decode([i]).strip().removeprefix("##") or "." for i in range(len(copied))]
            distinct = sorted(set(spellings))
            rows = {spelling: row for row, spelling in enumerate(distinct)}
            vectors = torch.as_tensor(teacher.encode(distinct)).float()[[rows[spelling] for spelling in spellings]]
            if config_fields.setdefault("embedding_dim", vectors.shape[1]) != vectors.shape[1]:
                raise ValueError(
                    f"the teacher's vectors have {vectors.shape[1]} dimensions, embedding_dim is "
                    f"{config_fields['embedding_dim']}; leave embedding_dim out to take the teacher's"
                )
            norms = vectors.norm(dim=1)
            bad = (~(torch.isfinite(norms) & (norms > 0))).nonzero()
            if len(bad):
                i = int(bad[0])
                raise ValueError(
                    f"the teacher gives token {i} ({spellings[i]!r}) a zero or non-finite vector; check it"
                )
        # A copy: a composite config sets the attention implementation of its parts, and this one is in use.
        text_config = copy.deepcopy(backbone.config)
        config = NativeRetrievalConfig(text_config=text_config, dtype=backbone.dtype, **config_fields)
        model = cls(config, backbone=backbone)
        model._stored_dtype, model.tokenizer, model._teacher_tokenizer = stored_dtype, tokenizer, teacher_tokenizer
        for part in (model.head, model.copy_path, model.probe):
            if part is not None:
                part.float()
        if teacher is not None and model.copy_path is not None:
            with torch.no_grad():
                model.copy_path.token_values.weight[: len(vectors)] = vectors
        if model.probe is not None:  # the tokens that would make the backbone write a query are a good place to start
            prompt = tokenizer(config.query_prompt, add_special_tokens=False)["input_ids"]
            ids = (prompt * config.num_probe_tokens)[-config.num_probe_tokens :]
            with torch.no_grad():
                embeddings = backbone.get_input_embeddings()(torch.tensor(ids, device=backbone.device))
                model.probe.embeddings.copy_(embeddings)
        return model.to(backbone.device).eval()

    # -- load and save ------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; but without a `dtype`, a processor that lacks bfloat16 computes in float32."""
        hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if k in kwargs}
        if kwargs.get("config") is None and os.path.isdir(pretrained_model_name_or_path):
            path = os.path.join(pretrained_model_name_or_path, kwargs.get("subfolder", ""), "config.json")
            if not os.path.isfile(path):  # transformers would build a default model of several billion weights
                raise OSError(f"{path} does not exist; give the directory of a saved NativeRetrievalModel")
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config would quantise the head too, which it does not survive; give `from_backbone` a quantised "
                "backbone to train one, or load this model as it is"
            )
        stored_dtype = None
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None and _float32_is_faster():
            config = kwargs.get("config") or cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub)
            stored_dtype, kwargs["dtype"] = config.dtype, torch.float32
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._stored_dtype = stored_dtype
        model._tokenizer_source = (str(pretrained_model_name_or_path), hub)
        trained_with = model.config.transformers_version or __version__
        if trained_with.split(".")[0] != __version__.split(".")[0]:
            logger.warning_once(
                f"This model was saved with transformers {trained_with}, and {__version__} is installed: check its results, "
                "or install the version that it was saved with."
            )
        if not model.config.store_backbone:
            hub = {k: hub[k] for k in ("token", "cache_dir", "local_files_only") if k in hub}
            source, revision = model.config.backbone_name_or_path, model.config.backbone_revision
            dtype, attention = model.backbone.dtype, model.backbone.config._attn_implementation
            del model.backbone  # an empty shell, which takes as much memory as what comes now
            try:
                weights = AutoModelForCausalLM.from_pretrained(
                    source, revision=revision, dtype=dtype, attn_implementation=attention, **hub
                )
            except OSError as error:
                raise OSError(
                    f"this repository holds the head alone; its backbone {source!r} (revision {revision}) could not be "
                    "fetched: make it reachable, or save the model with store_backbone=True"
                ) from error
            model.backbone = weights.requires_grad_(False).eval().to(model.head.linear_out.weight.device)
            model._hook_backbone()
        else:
            # Where it stops and how it samples is part of what a backbone generates; an older repository has no file.
            with suppress(OSError):
                model.backbone.generation_config = GenerationConfig.from_pretrained(model._tokenizer_source[0], **hub)
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """
        As in transformers; writes the tokenizer and the backbone's generation settings too, and leaves the backbone's
        weights out if `config.store_backbone` says. Those are written in the precision that they came in.
        """
        if kwargs.pop("push_to_hub", False):  # transformers would push before the tokenizers are written
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            hub = ("commit_message", "private", "token", "revision", "create_pr")
            hub = {name: kwargs.pop(name) for name in hub if name in kwargs}
            self.save_pretrained(save_directory, *args, **kwargs)
            return self.push_to_hub(repo_id, **hub)
        if not self.config.store_backbone:
            state = kwargs.pop("state_dict", None) or self.state_dict()
            kwargs["state_dict"] = {k: v for k, v in state.items() if not k.startswith("backbone.")}
        elif self._stored_dtype is not None:
            state, stored = kwargs.pop("state_dict", None) or self.state_dict(), {}
            kwargs["state_dict"] = {  # by address: tied weights stay one
                k: stored.setdefault(v.data_ptr(), v.to(self._stored_dtype)) if k.startswith("backbone.") else v
                for k, v in state.items()
            }
        # Whichever of the two classes is saved, the repository loads as both.
        self.config.auto_map = {
            model_class._auto_class: f"modeling_native_retrieval.{model_class.__name__}"
            for model_class in (NativeRetrievalModel, NativeRetrievalForCausalLM)
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        if self._stored_dtype is not None:
            self.config.dtype = self._stored_dtype
            self.config.save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)
        if self.teacher_tokenizer is not None:
            self.teacher_tokenizer.save_pretrained(os.path.join(save_directory, TEACHER_TOKENIZER))
        self.backbone.generation_config.save_pretrained(save_directory)

    @property
    def tokenizer(self):
        """The backbone's tokenizer; loaded from beside the weights when first used. May be set."""
        if self._tokenizer is None:
            if self._tokenizer_source is None:
                raise ValueError("this model was not loaded from anywhere; set model.tokenizer to the backbone's")
            source, hub = self._tokenizer_source
            # With its config at hand, the tokenizer's loader need not ask about the code of this repository.
            self.tokenizer = AutoTokenizer.from_pretrained(source, config=self.config.text_config, **hub)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer) -> None:
        seen = _tokenizer_fingerprint(tokenizer)
        if self.config.tokenizer_fingerprint is None:
            self.config.tokenizer_fingerprint = seen
        elif self.config.tokenizer_fingerprint != seen:
            logger.warning_once(
                "This tokenizer or its chat template is not the one that the query head was trained with: prompts come "
                "out differently, and queries will find less. Use the tokenizer that was saved with the model."
            )
        # Read once, and never per call: the ids that mark turns, those that end a written query, and their spellings.
        special = special_tokens_of(tokenizer)
        self._special_ids, self._special_tokens = list(special), list(special.values())
        self._user_turn = user_turn(tokenizer)
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._line_end_ids = [i for i, s in enumerate(pieces) if s and ("\u010a" in s or "\n" in s or s == "<0x0A>")]
        unknown = max(0, self.config.text_config.get_text_config().vocab_size - len(tokenizer))
        self._spellings = _spellings(tokenizer, pieces) + unknown * [b""]
        self._tokenizer = tokenizer  # last: another thread that sees it finds the rest as well

    @property
    def teacher_tokenizer(self):
        """The teacher's, in whose tokens the copy path reads a conversation; `None`: it reads in the backbone's."""
        if self._teacher_tokenizer is None and self.config.copy_vocab_size is not None:
            if self._tokenizer_source is None:
                raise ValueError("this model was not loaded from anywhere; its copy path lacks the teacher's tokenizer")
            source, hub = self._tokenizer_source
            subfolder = os.path.join(hub.get("subfolder", ""), TEACHER_TOKENIZER)
            try:
                self._teacher_tokenizer = PreTrainedTokenizerFast.from_pretrained(
                    source, **hub | {"subfolder": subfolder}
                )
            except Exception as error:  # of a damaged file, a plain one
                raise OSError(
                    f"{TEACHER_TOKENIZER}, a folder that was saved beside the weights of {source}, is missing or damaged; "
                    "copy it again"
                ) from error
        return self._teacher_tokenizer

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def train(self, mode: bool = True) -> "NativeRetrievalModel":
        super().train(mode)
        self.backbone.eval()  # frozen: dropout in it would only blur the features
        return self

    def generate(self, input_ids: torch.LongTensor | None = None, **kwargs):
        """
        The backbone's own `generate`. With `past_key_values` from `embed_query(..., return_cache=True)`, the tokens that
        the cache shares with `input_ids` do not pass again; the cache goes on recording, so that `embed_query` can take
        a vector at any later point.
        """
        input_ids = kwargs.pop("inputs", input_ids)  # transformers' own name for them
        if not isinstance(kwargs.get("past_key_values"), QueryCache) or input_ids is None:
            return self.backbone.generate(input_ids, **kwargs)
        cache = kwargs.pop("past_key_values")
        mask = kwargs.get("attention_mask")
        mask = self._mask_of(input_ids, cache) if mask is None else mask
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(mask.shape)} and input_ids {tuple(input_ids.shape)} must have the same shape"
            )
        prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
        returned = kwargs.get("num_return_sequences") or getattr(
            kwargs.get("generation_config") or self.backbone.generation_config, "num_return_sequences", None
        )
        if (returned or 1) > 1:
            raise ValueError(
                f"num_return_sequences={returned}: a conversation's cache goes on in one way; generate without past_key_values"
            )
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} reads the conversation anew; generate without past_key_values")
        laid_out, kwargs["attention_mask"], going_on = self._go_on(cache, prompts)
        cache._given, going_on._padding = mask, kwargs["attention_mask"]
        output = self.backbone.generate(laid_out, past_key_values=going_on, **kwargs)
        # Rows that go on from different places are laid out anew; the caller gets back what was given, and the new.
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        sequences = torch.cat((input_ids, sequences[:, laid_out.shape[1] :]), dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    # -- hidden states to vectors -------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        readout_mask: torch.BoolTensor | None = None,
        hidden_states: torch.Tensor | None = None,
        words: tuple[torch.Tensor, ...] | None = None,
        words_only: bool = False,
        use_probe: bool = False,
        probe_states: torch.Tensor | None = None,
    ) -> NativeRetrievalOutput:
        """
        Prompts to query vectors. Gradients never reach the backbone's weights, nor anything through the prompt.

        Args:
            input_ids, attention_mask (`(batch, tokens)`): prompts, padded on either side.
            readout_mask (`(batch, tokens)`, *optional*): the tokens the head reads: those of a written query, or by
                default each prompt's last `num_context_tokens`.
            hidden_states (`(batch, tokens, layers, hidden_size)`, *optional*): the backbone's, at
                `hidden_state_layers`, when they have been computed before; the backbone is then not run.
            words (*optional*): from [`words_of`], of the same tokens, when that has been done.
            words_only (`bool`): the copy path's words, weighted by salience alone, of any text, whose `input_ids` are
                those of [`encode_words`]; for its training.
            use_probe (`bool`): also pass the probe's tokens through the backbone, behind the prompts.
            probe_states (`(batch, num_probe_tokens, layers, hidden_size)`, *optional*): from [`pass_probe`], when that
                has been done.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if words_only:
            if self.copy_path is None:
                raise ValueError("words_only=True needs a copy path; this model has copy_num_heads=0")
            return NativeRetrievalOutput(
                query_embeddings=F.normalize(self.copy_path.words(input_ids, attention_mask.bool()), dim=-1)
            )
        if use_probe and probe_states is None:
            prefill = self.prefill(input_ids, attention_mask)
            hidden_states, probe_states = prefill.hidden_states, self.pass_probe(prefill)
        if hidden_states is None:
            hidden_states = self.prefill(input_ids, attention_mask, use_cache=False).hidden_states
        if hidden_states.shape[:2] != input_ids.shape:
            raise ValueError(
                f"hidden_states cover {tuple(hidden_states.shape[:2])} (batch, tokens), input_ids "
                f"{tuple(input_ids.shape)}; give both for the same tokens"
            )
        real = attention_mask.bool()
        if readout_mask is None:
            width = self.config.num_context_tokens
            readout_mask = real & (real.flip(1).cumsum(1).flip(1) <= width)
        else:
            width = self.head.num_positions
        if not readout_mask.any(1).all():
            raise ValueError("readout_mask leaves a row without a token to read; mark at least one in each")

        # The newest `width` tokens to read, in order, whichever side the padding is on.
        order = torch.where(readout_mask, torch.arange(input_ids.shape[1], device=input_ids.device), -1)
        order = order.topk(min(width, input_ids.shape[1]), dim=1).values.flip(1)
        read = hidden_states[torch.arange(len(order), device=order.device)[:, None], order.clamp(min=0)]
        vectors, summary = self.head(read.to(self.head.linear_in.weight.dtype), order >= 0)
        if probe_states is not None:
            more, asked = self.probe.read(probe_states)
            vectors, summary = vectors + more, summary + asked

        attributions = None
        if self.copy_path is not None:
            states = hidden_states[:, :, self.config.hidden_state_layers.index(self.config.copy_layer)]
            states = states.float().contiguous()  # once, for several passes over them
            words = words or self.words_of(input_ids, attention_mask)
            with torch.autocast(states.device.type, enabled=False):  # it adds up in full precision
                summary = summary.to(self.copy_path.query.weight.dtype)
                vectors, attributions = self.copy_path(vectors.float(), summary, states, *words)
        return NativeRetrievalOutput(
            query_embeddings=F.normalize(vectors.float(), dim=-1),
            attributions=attributions,
            input_ids=input_ids,
            attention_mask=attention_mask,
        )

    def encode_words(self, texts: list[str]) -> list[list[int]]:
        """Texts to ids of the tokens that the copy path has values for: the teacher's, or the backbone's."""
        tokenizer = self.teacher_tokenizer or self.tokenizer
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def words_of(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor, cache: QueryCache | None = None
    ) -> tuple[torch.Tensor, ...]:
        """
        What the copy path reads of prompts `(batch, tokens)`: their text, in the tokens that it has values for. Each turn is
        a text by itself, so of a conversation whose cache is given, only the turns that are new are read.

        Returns:
            the ids of these, the place of the prompt's token in which each ends, which of them may be copied, and how many
            special tokens follow each in the prompt (see [`_segments`]), all `(batch, words)`.
        """
        self.tokenizer  # noqa: B018, read first: loading it sets the special tokens
        device, real = input_ids.device, attention_mask.bool()
        special = torch.isin(input_ids, torch.tensor(self._special_ids, device=device)) & real
        segments = self._segments(input_ids, special, real)
        sink = real & (real.cumsum(1) == 1)  # the first token, on which attention rests that looks for nothing
        mask = real & ~special & ~sink
        if self.teacher_tokenizer is None:
            return input_ids, torch.arange(input_ids.shape[1], device=device).expand_as(mask), mask, segments
        teacher = self.config.teacher_name_or_path, self.config.teacher_fingerprint
        known, turns, read = {} if cache is None else cache.turns, {}, []
        for row, copied, there in zip(input_ids.cpu(), mask.cpu(), real.cpu(), strict=True):
            ids, ends = [], [torch.empty(0, dtype=torch.long)]
            where = there.nonzero().flatten()
            row, copied = row[where].tolist(), copied[where]
            changes = (copied[1:] != copied[:-1]).nonzero().flatten() + 1
            copied = copied.tolist()
            for start, end in itertools.pairwise([0, *changes.tolist(), len(row)]):
                if not any(copied[start:end]):
                    continue
                turn = (teacher, *row[start:end])
                if turn not in turns:
                    spellings = [self._spellings[i] for i in turn[1:]]
                    blank = not b"".join(spellings).strip()  # a line end between two turns
                    turns[turn] = ([], ends[0]) if blank else known.get(turn)
                    turns[turn] = turns[turn] or _read_in(self.teacher_tokenizer, spellings)
                if turns[turn][0]:
                    ids += turns[turn][0]
                    ends.append(start + turns[turn][1])
            read.append((ids, where[torch.cat(ends)]))
        if cache is not None:
            cache.turns = turns
        shape = len(read), max([1, *(len(ids) for ids, _ in read)])
        words, there = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        places = torch.full(shape, input_ids.shape[1] - 1)
        for row, (ids, where) in enumerate(read):
            words[row, : len(ids)], places[row, : len(ids)] = torch.tensor(ids, dtype=torch.long), where
            there[row, : len(ids)] = True
        words, places, there = (part.to(device) for part in (words, places, there))
        return words, places, there, segments.gather(1, places)

    def _segments(
        self, input_ids: torch.LongTensor, special: torch.BoolTensor, real: torch.BoolTensor
    ) -> torch.LongTensor:
        """
        How many special tokens follow each token, as if the last user's turn were the last: what an agent has said and called
        since would otherwise move the question to where an older one stands. Of what stands behind that turn, 0.
        """
        segments = special.flip(1).cumsum(1).flip(1)
        opening, behind, tool = self._user_turn
        if not opening or len(opening) > input_ids.shape[1]:
            return segments
        opening = torch.tensor(opening, device=input_ids.device)
        order = real.long().argsort(dim=1, stable=True)  # what goes on from a cache may have padding in the middle
        ids = input_ids.masked_fill(~real, -1).gather(1, order)
        found = (ids.unfold(1, len(opening), 1) == opening).all(-1)
        if tool:  # a tool's turn in a user's clothes
            next_tokens = F.pad(ids, (0, len(tool)), value=-1)[:, len(opening) :].unfold(1, len(tool), 1)
            found &= (next_tokens != torch.tensor(tool, device=ids.device)).any(-1)
        last = found.shape[1] - 1 - found.flip(1).long().argmax(1, keepdim=True) + len(opening) - 1
        last = order.gather(1, last)
        since = segments.gather(1, last) - special.long().gather(1, last) - behind
        numbered = segments - since.clamp(min=0)
        return torch.where(found.any(1, keepdim=True), numbered.masked_fill(numbered < behind, 0), segments)

    def _reading_part(self) -> nn.Module:
        """The backbone up to the last layer that is read, a view of it: those behind serve generation alone."""
        base, depth = self.backbone.base_model, max(self.config.hidden_state_layers)
        # Its first pass is a whole one: in it transformers hooks the layers, and would hook those of each copy again.
        hooked = getattr(base, "_output_capturing_hooks_installed", False)
        if not hooked or not 0 < depth < getattr(base.config, "num_hidden_layers", 0):
            return base
        part = copy.copy(base)
        part.config = copy.copy(base.config)
        part.config.num_hidden_layers = depth
        part.config.tie_last_hidden_states = False  # the last layer's states as they are, without the norm behind them
        return part

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        past_key_values: QueryCache | None = None,
        use_cache: bool = True,
    ) -> Prefill:
        """
        One pass of prompts `(batch, tokens)` through the backbone, without its language-model head. Of a cache's own
        tokens, which come first, none passes again.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        longest = getattr(self.config.text_config.get_text_config(), "max_position_embeddings", None)
        if longest and input_ids.shape[1] > longest and (tokens := int(attention_mask.sum(1).max())) > longest:
            raise ValueError(
                f"a prompt of {tokens} tokens is longer than the backbone's context of {longest}; lower max_prompt_tokens"
            )
        cache = past_key_values
        if cache is None and use_cache:
            cache = QueryCache(self.config)
        past = cache.get_seq_length() if cache is not None else 0
        backbone = self._reading_part() if cache is None else self.backbone.base_model
        output = backbone(
            input_ids=input_ids[:, past:],
            attention_mask=attention_mask,
            position_ids=(attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:],
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        )
        if cache is None:
            hidden_states = _stacked(output.hidden_states, self.config.hidden_state_layers)
            return Prefill(input_ids, attention_mask, hidden_states)
        cache._padding = cache._given = attention_mask
        return Prefill(*cache.recorded(), cache)

    def _go_on(self, cache: QueryCache, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, QueryCache]:
        """
        Prompts `(batch, tokens)` and their mask, laid out behind what a cache knows of them already, and that cache;
        what it knows beyond them is cut off. At least one token of each is left to pass: from its state the next follows.
        """
        input_ids, mask, _ = cache.recorded()
        if len(prompts) != len(input_ids):
            raise ValueError(f"the cache holds {len(input_ids)} conversations, and {len(prompts)} are to go on from it")
        known, rest = torch.zeros_like(mask), []
        for row, prompt in enumerate(prompts):
            places = mask[row].nonzero().flatten()[: len(prompt) - 1]
            same = input_ids[row, places] == torch.tensor(prompt, device=input_ids.device)[: len(places)]
            count = int(same.long().cumprod(0).sum())
            known[row, places[:count]] = 1
            rest.append(prompt[count:])
        known = known[:, : int(known.any(0).nonzero().max()) + 1 if known.any() else 0]
        if not known.shape[1] or not cache.cut(known):
            return *self.pad(prompts), QueryCache(self.config)
        more, more_mask = self.pad(rest)
        return (
            torch.cat((input_ids[:, : known.shape[1]], more), dim=1),
            torch.cat((known, more_mask), dim=1),
            cache,
        )

    def pass_probe(self, prefill: Prefill) -> torch.Tensor:
        """
        The states `(batch, num_probe_tokens, layers, hidden_size)` of the probe's tokens behind prefilled prompts. The
        prompts' cache stays as it is.
        """
        self._check_mode("probe")
        batch, count = len(prefill.input_ids), self.config.num_probe_tokens
        mask = torch.cat((prefill.attention_mask, prefill.attention_mask.new_ones(batch, count)), dim=1)
        passing = _PASSING.set(self.probe)
        try:
            output = self._reading_part()(
                inputs_embeds=self.probe.embeddings.to(self.backbone.dtype).expand(batch, -1, -1),
                attention_mask=mask,
                position_ids=(mask.long().cumsum(1) - 1)[:, -count:],
                past_key_values=prefill.past_key_values.branch(keeps=False),
                use_cache=True,
                output_hidden_states=True,
            )
        finally:
            _PASSING.reset(passing)
        return _stacked(output.hidden_states, self.config.hidden_state_layers)

    @torch.no_grad()
    def write_queries(self, prefill: Prefill) -> tuple[Prefill, list[list[int]]]:
        """
        Lets the backbone write a search query after each prompt, greedily, from the prompt's cache, which stays as it is.

        Returns:
            the prefill, longer by `query_prompt` and the query, and each query's tokens (without the line end).
        """
        device = prefill.input_ids.device
        batch, length = prefill.input_ids.shape
        start = self.tokenizer(self.config.query_prompt, add_special_tokens=False)["input_ids"]
        start = torch.tensor([start], device=device).expand(batch, -1)
        ends = self.backbone.generation_config.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        ends = sorted({i for i in ends if i is not None} | set(self._line_end_ids) | set(self._special_ids))
        generation_config = GenerationConfig(
            # One more than is kept: a token's state exists once the token after it is asked for.
            max_new_tokens=self.config.max_query_tokens + 1,
            min_new_tokens=1,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=self._pad_id(),
        )
        input_ids = torch.cat((prefill.input_ids, start), dim=1)
        mask = torch.cat((prefill.attention_mask, torch.ones_like(start)), dim=1)
        cache = prefill.past_key_values.branch()
        sequences = self.backbone.generate(
            input_ids=input_ids, attention_mask=mask, past_key_values=cache, generation_config=generation_config
        )
        _, _, hidden_states = cache.recorded()
        written = sequences[:, length + start.shape[1] :][:, : self.config.max_query_tokens]
        written = written[:, : hidden_states.shape[1] - length - start.shape[1]]
        real = (~torch.isin(written, torch.tensor(ends, device=device))).long().cumprod(1)
        input_ids = torch.cat((input_ids, written), dim=1)
        mask = torch.cat((mask, real), dim=1)
        queries = [row[keep.bool()].tolist() for row, keep in zip(written, real, strict=True)]
        return Prefill(input_ids, mask, hidden_states[:, : input_ids.shape[1]]), queries

    @torch.no_grad()
    def embed_prefilled(self, prefill: Prefill, mode: str | None = None) -> NativeRetrievalOutput:
        """The query vectors of prompts that have been prefilled; their cache stays as it is."""
        mode = self._check_mode(mode)
        readout_mask, queries, words, probe_states = None, None, None, None
        prompt_tokens, cache = prefill.input_ids.shape[1], prefill.past_key_values
        if mode == "generated":
            prefill, queries = self.write_queries(prefill)
            query_start = prompt_tokens + len(
                self.tokenizer(self.config.query_prompt, add_special_tokens=False)["input_ids"]
            )
            readout_mask = prefill.attention_mask.bool().clone()
            readout_mask[:, :query_start] = False
        elif mode == "probe":
            probe_states = self.pass_probe(prefill)
        if self.copy_path is not None:
            words = self.words_of(prefill.input_ids, prefill.attention_mask, cache)
        output = NativeRetrievalModel.forward(  # by name: a subclass's `forward` gives logits
            self,
            prefill.input_ids,
            prefill.attention_mask,
            readout_mask,
            prefill.hidden_states,
            words,
            probe_states=probe_states,
        )
        output.query_ids = queries
        return output

    # -- conversations to vectors -------------------------------------------------------------------------------------

    def embed_query(
        self,
        queries: str | Conversation | list[str] | list[Conversation] | torch.LongTensor,
        *,
        mode: str | None = None,
        batch_size: int | None = None,
        past_key_values: QueryCache | None = None,
        return_cache: bool = False,
        return_attributions: bool = False,
    ) -> torch.Tensor | NativeRetrievalOutput:
        """
        Query vectors in the teacher's space.

        Args:
            queries: a question, a list of questions, a conversation (a list of messages `{"role", "content"}`, ending
                on any role), a list of conversations, or token ids `(batch, tokens)` as `generate` returned them.
            mode (`"context"`, `"generated"` or `"probe"`, *optional*): defaults to `config.query_mode`.
            batch_size (`int`, *optional*): prompts in one pass; see [`embed_prompts`].
            past_key_values (`QueryCache`, *optional*): from an earlier call with `return_cache=True`: what it shares with
                these prompts, the tokens generated since included, does not pass again. It is cut to what is shared.
            return_cache (`bool`): also return the prompts' KV cache, token ids and mask, for `generate` and for the next
                turn. With either of these, all prompts go through in one batch.
            return_attributions (`bool`): also return each token's weight in the copy path, in one batch as well.

        Returns:
            `torch.FloatTensor` of shape `(queries, embedding_dim)`, L2-normalised; or a [`NativeRetrievalOutput`].

        Raises:
            `ValueError`: for malformed input, naming it.
        """
        mode = self._check_mode(mode)
        if past_key_values is not None and not isinstance(past_key_values, QueryCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; give the one that "
                "embed_query(..., return_cache=True) returned"
            )
        if isinstance(queries, torch.Tensor):
            if queries.ndim != 2 or not queries.shape[1] or queries.is_floating_point():
                raise ValueError(
                    f"queries {tuple(queries.shape)} {queries.dtype}; token ids must be (batch, tokens), with at least one "
                    "token"
                )
            size = self.config.text_config.get_text_config().vocab_size
            outside = queries[(queries < 0) | (queries >= size)]
            if len(outside):
                raise ValueError(
                    f"queries hold the token id {int(outside[0])}, outside the backbone's vocabulary of {size}; give ids "
                    "that model.tokenizer or model.generate gave"
                )
            prompts = self._without_padding(queries, past_key_values)
        else:
            prompts = [self.build_prompt(conversation) for conversation in _as_conversations(queries)]
        if past_key_values is not None or return_cache or return_attributions:
            if not prompts:
                raise ValueError("queries is empty; a cache or attributions need at least one conversation")
            if past_key_values is None:
                prefill = self.prefill(*self.pad(prompts))
            else:
                prefill = self.prefill(*self._go_on(past_key_values, prompts))
            output = self.embed_prefilled(prefill, mode)
            if return_cache:
                output.past_key_values = prefill.past_key_values
                output.input_ids, output.attention_mask = prefill.input_ids, prefill.attention_mask
                if output.attributions is not None:  # not those of a query that was written
                    output.attributions = output.attributions[:, : prefill.input_ids.shape[1]]
            return output if return_cache or return_attributions else output.query_embeddings.float().cpu()
        return self.embed_prompts(prompts, mode=mode, batch_size=batch_size)

    def embed_prompts(
        self, prompts: list[list[int]], *, mode: str | None = None, batch_size: int | None = None
    ) -> torch.FloatTensor:
        """
        Prompts, as [`build_prompt`] makes them, to query vectors `(prompts, embedding_dim)`, L2-normalised, on the CPU.

        Args:
            batch_size (`int`, *optional*): prompts in one pass, sorted by length, so that little of it is padding. By
                default 32 on an accelerator and 1 on a CPU: in bfloat16, a prompt's vector depends a little on the others
                beside it, and alone it is always the same. A few at a time are faster; `benchmarks/throughput.py`.

        Raises:
            `ValueError`: for a batch size below 1, or a mode that the model lacks.
        """
        mode = self._check_mode(mode)
        if batch_size is None:
            batch_size = 1 if self.backbone.device.type == "cpu" else 32
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number, at least 1")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty; give at least one token")
        vectors = torch.empty(len(prompts), self.config.embedding_dim)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            prefill = self.prefill(*self.pad([prompts[i] for i in rows]), use_cache=mode != "context")
            vectors[rows] = self.embed_prefilled(prefill, mode).query_embeddings.float().cpu()
        return vectors

    def build_prompt(self, conversation: Conversation) -> list[int]:
        """One conversation to token ids; see the function [`build_prompt`]."""
        tokenizer = self.tokenizer  # read first: loading it sets the special tokens
        return build_prompt(tokenizer, conversation, self.config.max_prompt_tokens, self._special_tokens)

    def pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left padding: `(input_ids, attention_mask)`, both `(batch, tokens)`, on the backbone's device."""
        width = max(len(prompt) for prompt in prompts)
        input_ids = torch.full((len(prompts), width), self._pad_id())
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, width - len(prompt) :] = 1
        return input_ids.to(self.backbone.device), attention_mask.to(self.backbone.device)

    def _without_padding(self, input_ids: torch.Tensor, cache: QueryCache | None) -> list[list[int]]:
        """Rows of token ids, without their padding on the left and what `generate` has put behind a row's end."""
        mask = self._mask_of(input_ids, cache)
        rows = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
        pad, end = self._pad_id(), self.tokenizer.eos_token_id
        for row in rows:
            while len(row) > 1 and row[-1] == pad and (pad != end or row[-2] == pad):
                row.pop()
        if any(row[0] == pad for row in rows):
            begins = self.build_prompt([{"role": "user", "content": "?"}])[0] == pad  # a prompt's own first token stays
            for row in rows:
                del row[: max(0, sum(1 for _ in itertools.takewhile(pad.__eq__, row[:-1])) - begins)]
        return rows

    @staticmethod
    def _mask_of(input_ids: torch.Tensor, cache: QueryCache | None) -> torch.Tensor:
        """Which tokens a cache does not know to be padding: `(batch, tokens)`."""
        mask = torch.ones_like(input_ids)
        if cache is not None:
            given = cache._given[:, : input_ids.shape[1]]
            if len(given) == len(mask):
                mask[:, : given.shape[1]] = given
        return mask

    def _pad_id(self) -> int:
        """The token that `generate` pads with, or what else may stand there."""
        settings = self.backbone.generation_config
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        known = (settings.pad_token_id, self.tokenizer.pad_token_id, *ends[:1], self.tokenizer.eos_token_id, 0)
        return next(token for token in known if token is not None)

    def _check_mode(self, mode: str | None) -> str:
        mode = self.config.query_mode if mode is None else mode
        if mode not in QUERY_MODES:
            raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(QUERY_MODES)}")
        if mode == "probe" and self.probe is None:
            raise ValueError("mode='probe' needs a model with a probe; this one has num_probe_tokens=0")
        return mode


def _as_conversations(queries) -> list[Conversation]:
    if isinstance(queries, str):
        queries = [queries]
    if not isinstance(queries, (list, tuple)):
        raise ValueError(f"queries is a {type(queries).__name__}; give a string, a conversation, or a list of either")
    if queries and all(isinstance(query, dict) for query in queries):
        queries = [queries]
    if all(isinstance(query, str) for query in queries):
        for i, query in enumerate(queries):
            if not query.strip():
                raise ValueError(f"query {i} is empty; give a question")
        return [[{"role": "user", "content": query}] for query in queries]
    if any(isinstance(query, (str, dict)) for query in queries):
        raise ValueError("queries mixes strings, messages and conversations; give a list of one kind")
    for i, query in enumerate(queries):
        check_messages(query, f"conversation {i}")
    return list(queries)


class NativeRetrievalForCausalLM(NativeRetrievalModel, GenerationMixin):
    """
    The same model where a plain language model is expected, as by `AutoModelForCausalLM` and
    `pipeline("text-generation")`: `forward` is the backbone's, with logits. It embeds queries as well.
    """

    def forward(self, *args, **kwargs):
        return self.backbone(*args, **kwargs)


NativeRetrievalModel.register_for_auto_class("AutoModel")
NativeRetrievalForCausalLM.register_for_auto_class("AutoModelForCausalLM")
__all__ = [
    "NativeRetrievalModel",
    "NativeRetrievalForCausalLM",
    "NativeRetrievalOutput",
    "Prefill",
    "QueryCache",
    "ProjectionHead",
    "CopyPath",
    "build_prompt",
    "plain_text",
    "processor_has_bfloat16",
    "special_tokens_of",
]
