"""Fixtures for all tests: models and data small enough to be made on the spot, so that nothing is downloaded."""

import hashlib
import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Before anything of Hugging Face is imported, which reads it once. A test that reaches for the network fails.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: threads of several would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
    Qwen3Config,
)

from modeling_native_retrieval import NativeRetrievalModel  # noqa: E402
from native_retrieval.initialise import from_backbone  # noqa: E402

FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "gpt2", "qwen3_5")
WITH_HEADS = FAMILIES[:4]  # whose attention heads can be copied
SELECTION_HEADS = [[1, 0], [2, 1]]
# Shorter than any prompt with a history in it, so that what a sliding window changes is seen.
SLIDING_WINDOW = 8
CONTEXT = 512

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "Who built the old bridge north of the station, and when was it opened?",
    "The lighthouse was built in 1874 by the town's own masons; it is still in use.",
    "What does the museum show? It shows maps, coins and the tools of the harbour.",
    "When did the railway reach the valley? The railway reached it in 1902.",
    "Tell me about the founder of the library. She was a teacher and a printer.",
    "Search query: the founder of the observatory and the year in which it was founded",
    "user assistant system tool Assistant User System",
    "How many people live in the village, and what is it known for?",
    "The orchestra was founded by students, and it plays in the theatre on the square.",
    "Where is the castle, who owned it, and why was it given up?",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--curve", metavar="FILE", help="where the memory test of the page writes its curve (JSON)")


@pytest.fixture(scope="session", autouse=True)
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what tests load out of the user's own cache."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(autouse=True)
def seed() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML; a line end is the ordinary token `Ċ`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHATML,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=CONTEXT,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of `make_tokenizer`."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_backbone(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PreTrainedModel]:
    """`make_backbone(family, tie=True, **config_fields)`: a tiny random causal language model in eval mode."""

    def make(
        family: str, tie: bool = True, *, seed: int = 0, dtype: torch.dtype = torch.float32, **fields
    ) -> PreTrainedModel:
        common = {
            "vocab_size": len(tiny_tokenizer) + 4,  # as in real models, a few more rows than tokens
            "tie_word_embeddings": tie,
            "initializer_range": 0.15,  # large enough for the most likely token to stand out
            "bos_token_id": tiny_tokenizer.bos_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
        }
        if family == "gpt2":
            config = GPT2Config(**{**common, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT, **fields})
        else:
            common |= {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "max_position_embeddings": CONTEXT,
            }
            if family in ("gemma3", "mistral"):
                common["sliding_window"] = SLIDING_WINDOW
            if family == "gemma3":
                common |= {
                    "query_pre_attn_scalar": 8,
                    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
                }
            if family == "qwen3_5":  # linear attention, whose state cannot be cut, in every other layer
                common |= {
                    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
                    "linear_num_key_heads": 2,
                    "linear_num_value_heads": 2,
                    "linear_key_head_dim": 8,
                    "linear_value_head_dim": 8,
                }
            configs = {
                "llama": LlamaConfig,
                "qwen3": Qwen3Config,
                "gemma3": Gemma3TextConfig,
                "mistral": MistralConfig,
                "qwen3_5": Qwen3_5TextConfig,
            }
            config = configs[family](**{**common, **fields})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_model(
    make_backbone: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., NativeRetrievalModel]:
    """`make_model(family="llama", tie=True, **config_fields)`: a tiny untrained model around `make_backbone`."""

    def make(
        family: str = "llama", tie: bool = True, *, backbone: PreTrainedModel | None = None, teacher=None, **fields
    ) -> NativeRetrievalModel:
        fields = {
            "head_dim": 32,
            "head_num_layers": 1,
            "head_num_attention_heads": 4,
            "encoder_dim": 32,
            "encoder_code_dim": 16,
            "max_query_tokens": 8,
            **({"selection_heads": SELECTION_HEADS} if family in WITH_HEADS else {}),
            **({} if teacher is not None else {"embedding_dim": 32}),
            **fields,
        }
        backbone = make_backbone(family, tie) if backbone is None else backbone
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return from_backbone(backbone, teacher, tokenizer=tiny_tokenizer, **fields)

    return make


@pytest.fixture
def tiny_model(make_model: Callable[..., NativeRetrievalModel]) -> NativeRetrievalModel:
    """Untrained, around a tiny Llama, with vectors of 32 dimensions; fresh for each test, so that it may be trained."""
    return make_model()


@pytest.fixture(scope="session")
def backbone_dir(
    make_backbone: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny Llama and its tokenizer, saved as any backbone on the Hub is."""
    folder = tmp_path_factory.mktemp("backbone") / "tiny-llama"
    make_backbone("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_dir(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real sentence-transformers model of 32 dimensions: the normalised mean of random vectors of tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    folder = tmp_path_factory.mktemp("teacher") / "tiny-teacher"
    with torch.random.fork_rng():
        torch.manual_seed(2)
        words = StaticEmbedding(tiny_tokenizer.backend_tokenizer, embedding_dim=32)
    SentenceTransformer(modules=[words, Normalize()], device="cpu").save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def make_taught_model(make_model: Callable[..., NativeRetrievalModel], teacher_dir: Path):
    """`make_taught_model(**config_fields)`: (tiny untrained model that knows its teacher, the teacher of `teacher_dir`)."""
    from native_retrieval.teacher import Teacher

    def make(**fields):
        teacher = Teacher(str(teacher_dir))
        names = {"teacher_name_or_path": str(teacher_dir), "teacher_fingerprint": teacher.fingerprint}
        return make_model(teacher=teacher, **names, **fields), teacher

    return make


class StubTeacher:
    """The interface of `native_retrieval.teacher.Teacher`: a text's vector is the sum of fixed vectors of its words."""

    dimension = 32
    name_or_path = "stub-teacher"
    revision = None
    max_seq_length = 64
    transformer = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None = None):
        self.tokenizer = tokenizer

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text)["input_ids"])

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.name_or_path.encode()).hexdigest()

    identity = fingerprint

    def encode(
        self, texts: Sequence[str], kind: str = "query", progress: str | None = None, half_precision: bool = False
    ) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()) or [text]:
                digest = hashlib.sha256(word.encode()).digest()
                vectors[row] += np.frombuffer(digest, dtype=np.uint8)[: self.dimension].astype(np.float32) - 127.5
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    cached = encode

    def documents(self, corpus) -> np.ndarray:
        texts = [f"{title} {text}".strip() for title, text in zip(corpus["title"], corpus["text"], strict=True)]
        return self.encode(texts, "document")

    def ranking(self, targets: np.ndarray, documents: np.ndarray, k: int = 128) -> np.ndarray:
        scores = np.asarray(targets) @ np.asarray(documents).T
        return np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)


@pytest.fixture(scope="session")
def stub_teacher(tiny_tokenizer: PreTrainedTokenizerFast) -> StubTeacher:
    return StubTeacher(tiny_tokenizer)


PLACES = (
    ("Arnwick Lighthouse", "Ida Munro", "slate", "1874"),
    ("Belford Museum", "Jonas Pike", "coins", "1911"),
    ("Carrow Railway", "Lena Voss", "timber", "1902"),
    ("Dunmore Library", "Rosa Klein", "manuscripts", "1846"),
    ("Elsdon Castle", "Hugh Tarn", "wool", "1310"),
    ("Farley Orchestra", "Mina Osei", "marches", "1968"),
    ("Glenholm Observatory", "Pavel Dorn", "comets", "1889"),
    ("Harwood Brewery", "Tess Quill", "stout", "1795"),
    ("Inver Harbour", "Olaf Brandt", "herring", "1822"),
    ("Jarrow Theatre", "Nora Finch", "operas", "1930"),
)
QUESTIONS = (
    ("When was {place} founded?", "When was {place} founded?", "{place} was founded in {year}."),
    ("Who was behind it, and what did {year} change?", "Who founded {place}?", "{founder} founded {place}."),
    ("And what is known there, {thing} perhaps?", "What is {place} known for?", "{place} is known for {thing}."),
)
SPLITS = {"train": range(4), "dev": range(4, 6), "test": range(6, 8)}


def write_beir_folder(folder: Path) -> Path:
    """30 documents (three on each of ten places); 24 queries in 8 conversations of three turns, with rewrites."""
    names = ("place", "founder", "thing", "year")
    corpus, queries, qrels = [], [], {}
    for number, values in enumerate(PLACES):
        words = dict(zip(names, values, strict=True))
        messages: list[dict[str, str]] = []
        for turn, templates in enumerate(QUESTIONS, start=1):
            question, rewrite, answer = (template.format(**words) for template in templates)
            corpus.append({"_id": f"d{number}_{turn}", "title": words["place"], "text": answer})
            messages = [*messages, {"role": "user", "content": question}]
            if number < 8:
                queries.append(
                    {
                        "_id": f"q{number}_{turn}",
                        "messages": messages,
                        "rewrite": rewrite,
                        "metadata": {"conv": f"c{number}", "turn": turn, "switch": False},
                    }
                )
                qrels[f"q{number}_{turn}"] = f"d{number}_{turn}"
            messages = [*messages, {"role": "assistant", "content": answer}]
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    for split, conversations in SPLITS.items():
        rows = [f"{query}\t{document}\t1\n" for query, document in qrels.items() if int(query[1]) in conversations]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


@pytest.fixture(scope="session")
def beir_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `beir_folder`, for fixtures that live longer than a test; not to be changed."""
    return write_beir_folder(tmp_path_factory.mktemp("beir") / "beir")


@pytest.fixture
def beir_folder(tmp_path: Path) -> Path:
    """A folder in the layout of `native_retrieval.data`: splits train (12 queries), dev (6) and test (6)."""
    return write_beir_folder(tmp_path / "beir")


MODES = ("context", "generated")

# Tied or not is the same code in all families, so each comes once, and one both ways.
BACKBONES = [("llama", True), ("llama", False), ("qwen3", True), ("gemma3", True), ("mistral", False), ("gpt2", True)]
BACKBONES += [("qwen3_5", True)]

CONVERSATIONS = [
    [{"role": "user", "content": "Who built the old bridge?"}],
    [
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "Tell me about the library."},
        {"role": "assistant", "content": "It was founded in 1846 by a teacher and a printer."},
        {"role": "user", "content": "And who owned it?"},
    ],
    [
        {"role": "user", "content": "What does the museum show?"},
        {"role": "assistant", "content": "Let me look that up."},
        {"role": "tool", "content": "Belford Museum: maps, coins, tools of the harbour."},
    ],
    [{"role": "user", "content": "When?"}],
    [
        {"role": "user", "content": "Where is the castle, and why was it given up?\nPlease be brief."},
        {"role": "assistant", "content": "The castle stands"},
    ],
]


def run_here(words: Sequence[str]) -> int | str | None:
    """
    A script or `-m module`, and its arguments, in this process: one of its own would first import torch, for ten seconds.
    Returns its exit status; of what ended well, 0 or None.
    """
    before = sys.argv
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    return 0


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def assert_close(seen: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(seen, wanted, atol=1e-5, rtol=0)


def assert_one_line(error: pytest.ExceptionInfo) -> None:
    assert str(error.value) and "\n" not in str(error.value)


def prompts_of(model: NativeRetrievalModel, conversations: Sequence = CONVERSATIONS) -> list[list[int]]:
    return [model.processor.encode(conversation) for conversation in conversations]


def pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    width = max(map(len, rows))
    filled = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + row if side == "left" else row + f for f, row in zip(filled, rows, strict=True)])


def stir(model: NativeRetrievalModel) -> NativeRetrievalModel:
    """Makes every part of an untrained head count: those that start at zero would hide what goes wrong before them."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.query_head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def take_steps(model: NativeRetrievalModel, steps: int = 3) -> None:
    """A few optimiser steps on everything that can be trained."""
    rows = prompts_of(model)
    ids, mask = pad(rows, 0, "left"), pad([[1] * len(row) for row in rows], 0, "left")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    target = torch.eye(len(rows), model.config.embedding_dim)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        (1 - (model(ids, mask).query_embeddings * target).sum(-1)).mean().backward()
        optimiser.step()
    model.eval()


@pytest.fixture(params=BACKBONES, ids=lambda p: f"{p[0]}-{'tied' if p[1] else 'untied'}", scope="module")
def model(request: pytest.FixtureRequest, make_model: Callable[..., NativeRetrievalModel]) -> NativeRetrievalModel:
    return stir(make_model(*request.param))
