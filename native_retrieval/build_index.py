"""
Embeds the documents of a data set with the teacher, and writes them as an index.

    python -m native_retrieval.build_index --corpus my_data --teacher BAAI/bge-small-en-v1.5 --output indexes/mine

An index that you have already needs none of this: see docs/integrations.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import CommandParser, one_line_errors


@one_line_errors("build_index")
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser("python -m native_retrieval.build_index", __doc__)
    parser.add_argument("--corpus", required=True, help="folder or Hub id with corpus.jsonl")
    parser.add_argument("--teacher", required=True, help="embedding model: sentence-transformers path or Hub id")
    parser.add_argument("--output", required=True, type=Path, help="the directory to write; new, or empty")
    parser.add_argument("--cache_dir", default=".cache/native_retrieval", help="of vectors (default: %(default)s)")
    words = parser.parse_args(argv)
    if words.output.exists() and not (words.output.is_dir() and not any(words.output.iterdir())):
        raise ValueError(f"--output {words.output} exists, wanted a new or empty directory; remove it, or name another")

    from .data import load_corpus
    from .index import DocumentIndex
    from .teacher import Teacher

    documents, teacher = load_corpus(words.corpus), Teacher(words.teacher, cache_dir=words.cache_dir)
    vectors = teacher.documents(documents)
    DocumentIndex.build(documents, vectors, teacher.fingerprint, teacher.name_or_path, words.output)
    print(f"{len(documents):,} documents: {words.output}")


if __name__ == "__main__":
    sys.exit(main())
