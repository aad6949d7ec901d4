"""
From a conversation to documents.

    python examples/quickstart.py                   # what `make demo-train` has made
    python examples/quickstart.py MODEL INDEX       # your own
"""

import sys

from native_retrieval.cli import CommandParser, one_line_errors
from native_retrieval.index import DocumentIndex, label
from native_retrieval.loading import load_model

MESSAGES = [
    {"role": "user", "content": "Who painted Guernica?"},
    {"role": "assistant", "content": "Pablo Picasso, in 1937."},
    {"role": "user", "content": "Which war is it about?"},
]


@one_line_errors("quickstart.py")
def main() -> None:
    parser = CommandParser("quickstart.py", __doc__)
    parser.add_argument("model", nargs="?", default=".cache/demo/model", help="a trained model (default: %(default)s)")
    parser.add_argument("index", nargs="?", default=".cache/demo/index", help="its teacher's (default: %(default)s)")
    words = parser.parse_args()
    model, index = load_model(words.model), DocumentIndex.load(words.index)
    index.check_model(model.config)
    scores, rows = index.search(model.embed_query(MESSAGES), k=3)
    for score, row in zip(scores[0], rows[0], strict=True):
        print(f"{score:.3f}  {label(index.documents[int(row)])}")


if __name__ == "__main__":
    sys.exit(main())
