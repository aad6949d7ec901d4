# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Encoding a corpus: memory by the size of the corpus, and the speed of the teacher.

    python benchmarks/corpus.py --output results/bench-corpus.json

The texts are the Wikipedia leads of `make demo`, repeated, and for speed their sentences. Memory is measured with a very
cheap teacher, speed with the real one, each in its own process. Peak resident memory includes the pages of mapped files,
which the system can take back; the anonymous part is the memory of the process itself.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import datasets
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer

from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.data import load_corpus, load_texts
from native_retrieval.results import environment, write_json
from native_retrieval.teacher import Teacher


def memory_mb(field: str) -> float:
    """`VmHWM`, the peak of resident memory, or `RssAnon`, the anonymous part of it now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


class AnonymousPeak(threading.Thread):
    """Looks ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.1):
            self.peak = max(self.peak, memory_mb("RssAnon"))


def measure(teacher_path: str, corpus_path: str) -> None:
    """Encodes a corpus on disk, and prints what that took as JSON."""
    corpus = datasets.load_from_disk(corpus_path)
    watch = AnonymousPeak()
    with tempfile.TemporaryDirectory() as folder:
        teacher = Teacher(teacher_path, cache_dir=folder)
        teacher.encode(corpus[:64]["text"], "document")
        watch.start()
        begin = time.perf_counter()
        vectors = teacher.documents(corpus)
        seconds = time.perf_counter() - begin
        watch.done.set()
        assert vectors.shape == (len(corpus), teacher.dimension)
    row = {
        "documents": len(corpus),
        "seconds": round(seconds, 1),
        "documents_per_s": round(len(corpus) / seconds, 1),
        "peak_rss_mb": round(memory_mb("VmHWM")),
        "peak_anonymous_mb": round(watch.peak),
    }
    print(json.dumps(row))


def write_cheap_teacher(tokenizer_file: Path, folder: str) -> None:
    """A sentence-transformers model that adds up vectors of tokens."""
    words = StaticEmbedding(Tokenizer.from_file(str(tokenizer_file)), embedding_dim=32)
    SentenceTransformer(modules=[words, Normalize()], device="cpu").save(folder, create_model_card=False)


def write_corpus(documents: datasets.Dataset, count: int, folder: str) -> None:
    """`count` documents with a title and a text, over and over the same ones, written out."""
    documents.select([i % len(documents) for i in range(count)]).save_to_disk(folder)


@one_line_errors("corpus.py")
def main() -> None:
    parser = CommandParser("corpus.py", __doc__)
    parser.add_argument("--corpus", default=".cache/demo/wikipedia", help="(default: %(default)s)")
    parser.add_argument("--teacher", default=".cache/demo/all-MiniLM-L6-v2", help="(default: %(default)s)")
    parser.add_argument(
        "--memory_documents", type=int, nargs=2, default=[50_000, 500_000], help="(default: %(default)s)"
    )
    parser.add_argument("--speed_documents", type=int, default=20_000, help="(default: %(default)s)")
    parser.add_argument("--output", required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    leads, sentences = load_corpus(arguments.corpus), load_texts(arguments.corpus)
    if not Path(arguments.teacher, "tokenizer.json").is_file():
        raise ValueError(f"--teacher: {arguments.teacher} has no tokenizer.json; name a sentence-transformers folder")
    sentences = sentences.add_column("title", [""] * len(sentences))
    output = Path(arguments.output)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cheap = f"{folder}/cheap-teacher"
        write_cheap_teacher(Path(arguments.teacher, "tokenizer.json"), cheap)
        works = [("a cheap teacher, leads", cheap, leads, count) for count in arguments.memory_documents]
        real = f"{Path(arguments.teacher).name}, sentences of leads"
        works.append((real, arguments.teacher, sentences, arguments.speed_documents))
        for what, teacher, documents, count in works:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                write_corpus(documents, count, f"{scratch}/corpus")
                command = [sys.executable, __file__, "--measure", teacher, f"{scratch}/corpus"]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"what": what, **json.loads(done.stdout)})
            print(rows[-1], flush=True)
    result = {"command": " ".join(["python", *sys.argv]), "environment": environment(), "rows": rows}
    write_json(result, output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:  # one row, in a process that has done nothing else
        measure(*sys.argv[2:])
    else:
        sys.exit(main())
