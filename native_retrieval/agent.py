"""
An agent that searches before it answers. Each turn passes through the model once: the prefill of the conversation gives the
query vector, the documents found are appended, and the answer and the next turn reuse the same KV cache.

    agent = Agent(model, index)
    found = agent.search("Who painted Guernica?")
    for piece in agent.answer():
        print(piece, end="", flush=True)
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from modeling_native_retrieval import NativeRetrievalModel, QueryCache

from .conversations import search_results
from .index import DocumentIndex


@dataclass
class Found:
    """The documents of a search, best first, their scores, the query vector, and the milliseconds of each part."""

    documents: list[dict[str, str]]
    scores: list[float]
    vector: np.ndarray
    milliseconds: dict[str, float]


class Agent:
    """
    One conversation with a model that searches before it answers.

    Args:
        model: a trained model.
        index: its teacher's index.
        num_documents: documents found each turn.
        num_read: of these, how many the model reads; a small model is confused by many.
        max_new_tokens: longest answer.
        tools, template_kwargs: tools and further arguments of the backbone's chat template, such as `enable_thinking`.
    """

    def __init__(
        self,
        model: NativeRetrievalModel,
        index: DocumentIndex,
        num_documents: int = 5,
        num_read: int = 1,
        max_new_tokens: int = 96,
        tools: list | None = None,
        **template_kwargs,
    ):
        for name, value in (("num_documents", num_documents), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        index.check_model(model.config)
        self.model, self.index, self.template_kwargs = model, index, {"tools": tools, **template_kwargs}
        self.num_documents, self.num_read, self.max_new_tokens = num_documents, num_read, max_new_tokens
        self.messages: list[dict] = []
        # Read in their own turn only: later prompts stay short, and old documents don't draw later vectors to them.
        self.results: dict[str, str] | None = None
        self.cache: QueryCache | None = None
        self.first_token_ms: float | None = None

    def search(self, question: str) -> Found:
        """Takes the user's turn, and finds documents with the vector that its prefill gives."""
        begin = time.perf_counter()
        messages = [*self.messages, {"role": "user", "content": question}]
        output = self.model.embed_query(
            [messages], past_key_values=self.cache, return_cache=True, **self.template_kwargs
        )
        vector = output.query_embeddings.float().cpu().numpy()
        embedded = time.perf_counter()
        scores, rows = self.index.search(vector, self.num_documents)
        documents = [self.index.documents[row] for row in rows[0].tolist() if row != -1]
        searched = time.perf_counter()
        self.messages, self.cache = messages, output.past_key_values
        self.results = search_results(question, documents[: self.num_read])
        milliseconds = {"prefill and vector": 1000 * (embedded - begin), "search": 1000 * (searched - embedded)}
        return Found(documents, scores[0].tolist()[: len(documents)], vector[0], milliseconds)

    def answer(self) -> Iterator[str]:
        """
        Streams the answer. A caller who stops listening stops the generation too; what was said stays in `messages`.

        Raises:
            `ValueError`: before the first `search`.
        """
        if self.results is None:
            raise ValueError("there is no question to answer; call search(question) first")
        prompt = torch.tensor([self.model.processor.encode([*self.messages, self.results], **self.template_kwargs)])
        context = getattr(self.model.backbone.config.get_text_config(), "max_position_embeddings", None)
        room = max(1, context - prompt.shape[1]) if context else self.max_new_tokens
        streamer = TextIteratorStreamer(self.model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped, failure = threading.Event(), []

        def generate() -> None:
            try:
                self.model.generate(
                    prompt.to(self.model.backbone.device),
                    attention_mask=torch.ones_like(prompt, device=self.model.backbone.device),
                    past_key_values=self.cache,
                    max_new_tokens=min(self.max_new_tokens, room),
                    do_sample=False,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList(
                        [lambda ids, scores: torch.full(ids.shape[:1], stopped.is_set(), device=ids.device)]
                    ),
                )
            except Exception as error:
                failure.append(error)
                streamer.end()

        begin, said = time.perf_counter(), ""
        thread = threading.Thread(target=generate)
        thread.start()
        try:
            for piece in streamer:
                if not said:
                    self.first_token_ms = 1000 * (time.perf_counter() - begin)
                said += piece
                yield piece
        finally:
            stopped.set()
            thread.join()
            self.messages = [*self.messages, {"role": "assistant", "content": said}]
        if failure:
            raise failure[0]
