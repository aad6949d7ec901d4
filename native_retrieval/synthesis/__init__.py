"""Makes training conversations from a bare corpus, for users who have no logs.

Without a model (it takes seconds, and the output is the same on every machine), and with one:

    python -m native_retrieval.synthesis --corpus corpus.jsonl --output data/mine --num_conversations 2000
    python -m native_retrieval.synthesis --corpus corpus.jsonl --output data/mine --num_conversations 2000 \
        --llm Qwen/Qwen2.5-1.5B-Instruct

The output has the BEIR layout with chat messages that training and evaluation read. `TemplateGenerator` takes its
questions from what each text says (its verbs, years, names), so they use the words of the corpus.
"""

from .entities import Entity, read_entity
from .llm import LLMGenerator, parse_turns
from .turns import Generator, TemplateGenerator, Turn, casual, fill
from .write import check_corpus, conversation_rows, divide, load_corpus, synthesise

__all__ = [
    "Entity",
    "Generator",
    "LLMGenerator",
    "TemplateGenerator",
    "Turn",
    "casual",
    "check_corpus",
    "conversation_rows",
    "divide",
    "fill",
    "load_corpus",
    "parse_turns",
    "read_entity",
    "synthesise",
]
