"""Conversations that a causal language model writes."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .entities import SENTENCE_END, read_entity
from .turns import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LLM_PROMPT = """Text about "{title}":
{text}

A person chats with an assistant about this text. Write {count} questions that this person asks one after the other, \
each answered by the text. Question 1 names {title}. The later ones use pronouns or leave words out, as people do in a \
chat. Put each question on its own line, and behind it, after a "|", the same question rewritten so that it can be \
understood alone, with the name {title} in it. Example of two lines:
When was the Eiffel Tower built? | When was the Eiffel Tower built?
and how tall is it? | How tall is the Eiffel Tower?
Write the {count} lines and nothing else."""


class LLMGenerator:
    """Writes conversations with a causal LM: questions about one document, then about a second one.

    Any model and tokenizer of transformers will do. The tokenizer's chat template is used if it has one. Output that
    cannot be parsed is skipped, so fewer conversations than requested may be written.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 0.8,
        seed: int = 0,
    ) -> None:
        from processing_native_retrieval import NativeRetrievalProcessor  # slow to import, and templates need no model

        self.model, self.processor = model, NativeRetrievalProcessor(tokenizer)
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.temperature, self.seed = temperature, seed

    def generate(self, documents: Sequence[dict[str, str]], num_conversations: int) -> Iterator[list[Turn]]:
        """Yields up to `num_conversations` conversations, and stops after three times as many attempts."""
        rng = random.Random(self.seed)
        documents = [document for document in documents if read_entity(document)]
        if len(documents) < 2:
            raise ValueError(f"LLMGenerator needs 2 usable documents to switch between, got {len(documents)}.")
        written = attempts = 0
        while written < num_conversations and attempts < 3 * num_conversations:
            plans = [
                [(document, rng.randint(2, 3)) for document in rng.sample(documents, 2)]
                for _ in range(min(self.batch_size, 3 * num_conversations - attempts))
            ]
            attempts += len(plans)
            asked = [part for plan in plans for part in plan]
            prompts = [LLM_PROMPT.format(title=d["title"], text=d["text"][:1500], count=n) for d, n in asked]
            outputs = iter(self.complete(prompts, seed=self.seed + attempts))
            for plan in plans:
                turns = [
                    turn
                    for number, (document, count) in enumerate(plan)
                    for turn in parse_turns(next(outputs), document, count, switch=number > 0)
                ]
                if len(turns) >= 3 and written < num_conversations:
                    written += 1
                    yield turns
        if written < num_conversations:
            logger.warning("The LLM wrote %d usable conversations in %d attempts.", written, attempts)

    def complete(self, prompts: list[str], seed: int) -> list[str]:
        """The model's continuations of `prompts`, without the prompts."""
        import torch

        # Without thinking: Qwen3 would think until the tokens are used up. Templates that cannot think ignore it.
        encoded = [self.processor.encode([{"role": "user", "content": p}], enable_thinking=False) for p in prompts]
        texts: list[str] = []
        for start in range(0, len(encoded), self.batch_size):
            input_ids, attention_mask = self.processor.pad(encoded[start : start + self.batch_size])
            with torch.random.fork_rng(), torch.inference_mode():
                torch.manual_seed(seed + start)
                output = self.model.generate(
                    input_ids.to(self.model.device),
                    attention_mask=attention_mask.to(self.model.device),
                    max_new_tokens=self.max_new_tokens,
                    do_sample=True,
                    temperature=self.temperature,
                    pad_token_id=self.processor.pad_token_id,
                )
            new_tokens = output[:, input_ids.shape[1] :]
            texts.extend(self.processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True))
        return texts


def parse_turns(output: str, document: dict[str, str], count: int, switch: bool) -> list[Turn]:
    """The turns in an LLM's output, at most `count`: lines "question | rewrite" whose rewrite names the document."""
    turns: list[Turn] = []
    name = {word for word in re.findall(r"\w+", document["title"].lower()) if len(word) > 2} or {
        document["title"].lower()
    }
    sentences = SENTENCE_END.split(re.sub(r"\s+", " ", document["text"]).strip())
    for line in output.splitlines():
        question, bar, rewrite = (part.strip(' "*') for part in line.partition("|"))
        question = re.sub(r"^(?:\d+[.):]|[-*•]|Q\d*:)\s*", "", question)
        words = set(re.findall(r"\w+", rewrite.lower()))
        if not bar or not 1 < len(question) <= 200 or not 8 <= len(rewrite) <= 200 or "|" in rewrite:
            continue
        if not rewrite.endswith("?") or not words & name or rewrite in {turn.rewrite for turn in turns}:
            continue
        if not turns and not name & set(re.findall(r"\w+", question.lower())):
            question = rewrite  # nothing has named the document yet
        answer = max(sentences, key=lambda sentence: len(words & set(re.findall(r"\w+", sentence.lower()))))
        turns.append(Turn(question, rewrite, answer, document["_id"], "llm", switch and not turns))
    return turns[:count]
