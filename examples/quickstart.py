"""A conversation to documents, with what `make demo` has made: `python examples/quickstart.py [MODEL INDEX]`."""

import sys

from transformers import AutoModel

from native_retrieval.index import DocumentIndex

model_dir, index_dir = sys.argv[1:] or (".cache/demo/model", ".cache/demo/index")
model = AutoModel.from_pretrained(model_dir, trust_remote_code=True)
index = DocumentIndex.load(index_dir)
index.check_model(model.config)

messages = [
    {"role": "user", "content": "Who painted Guernica?"},
    {"role": "assistant", "content": "Pablo Picasso, in 1937."},
    {"role": "user", "content": "Which war is it about?"},
]
scores, rows = index.search(model.embed_query(messages), k=3)
for score, row in zip(scores[0], rows[0], strict=True):
    print(f"{score:.3f}  {index.documents[int(row)]['title']}")
