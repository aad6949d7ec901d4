# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Conversations in mteb: a BEIR folder with messages as a retrieval task, and an encoder that gets the messages. mteb's own
wrapper joins them into one string. mteb keeps the roles and contents of messages only: no tools, no tool calls.

    import mteb
    from sentence_transformers import SentenceTransformer
    from native_retrieval.integrations.mteb import ConversationEncoder, retrieval_task

    model = ConversationEncoder(SentenceTransformer("exported", trust_remote_code=True))
    results = mteb.evaluate(model, retrieval_task("my_data", "test"), cache=None)
"""

import os

import numpy as np
from mteb import TaskMetadata
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from torch.utils.data import DataLoader

from ..data import load_task


class ConversationEncoder(SentenceTransformerEncoderWrapper):
    """mteb's wrapper, for a SentenceTransformer whose `encode_query` takes conversations (see `export.py`)."""

    def encode(self, inputs: DataLoader, *, prompt_type: PromptType | None = None, **kwargs) -> np.ndarray:
        if prompt_type != PromptType.query or "conversation" not in inputs.dataset.column_names:
            return super().encode(inputs, prompt_type=prompt_type, **kwargs)
        conversations = [conversation for batch in inputs for conversation in batch["conversation"]]
        for setting in ("task_metadata", "hf_split", "hf_subset"):
            kwargs.pop(setting)
        return self.model.encode_query(conversations, **kwargs)


def retrieval_task(source: str | os.PathLike[str], split: str = "test") -> AbsTaskRetrieval:
    """
    A folder or Hub id with corpus, queries with messages, and qrels (see `data.py`) as a task for `mteb.evaluate`.

    Raises:
        `DataError`: naming every bad row.
    """
    task = load_task(source, split)

    class ConversationalRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="".join(character if character.isalnum() else "-" for character in task.name),
            description=f"Conversational retrieval on {task.name}.",
            reference=None,
            dataset={"path": str(source), "revision": "local"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=[split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
        )

        def load_data(self, **kwargs) -> None:
            self.dataset = {
                "default": {
                    split: {
                        "corpus": task.corpus.rename_column("_id", "id"),
                        "queries": task.queries.select_columns(["_id", "messages"]).rename_columns(
                            {"_id": "id", "messages": "text"}
                        ),
                        "relevant_docs": task.qrels,
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return ConversationalRetrieval()
