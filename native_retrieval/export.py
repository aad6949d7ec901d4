# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
A trained model as a sentence-transformers folder: queries go to the language model, documents to its teacher.

    python -m native_retrieval.export outputs/best exported

    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer("exported", trust_remote_code=True)
    queries = model.encode_query(["Who painted Guernica?", [{"role": "user", "content": "Where is it?"}]])
    documents = model.encode_document(["Guernica is a painting by Pablo Picasso."])
    model.similarity(queries, documents)

Whatever takes a SentenceTransformer takes this: its evaluators, its vector-store integrations, mteb.
"""

import os
import sys
from pathlib import Path

from sentence_transformers import SentenceTransformer
from transformers.utils import logging

from modeling_native_retrieval import NativeRetrievalModel

from .cli import CommandParser, one_line_errors
from .integrations.native_query import NativeQuery, NativeRouter
from .loading import load_model, local_paths
from .teacher import teacher_of


def to_sentence_transformer(model: NativeRetrievalModel, teacher: str | None = None) -> SentenceTransformer:
    """
    One `SentenceTransformer` with a query route (the model) and a document route (its teacher).

    Args:
        model: a trained model.
        teacher: name or path of its teacher, if `config.teacher_name_or_path` cannot be found from here.

    Raises:
        `ValueError`: if the teacher is not the one that the model was trained towards.
    """
    documents = teacher_of(model.config, teacher)
    router = NativeRouter.for_query_document([NativeQuery(model.eval())], list(documents.model.children()))
    # The model has learnt the vectors that the teacher gives to prompted queries; documents keep their prompt.
    prompts = {**documents.model.prompts, "query": ""}
    return SentenceTransformer(modules=[router], prompts=prompts, similarity_fn_name="cosine")


def export(model_dir: str | os.PathLike, output_dir: str | os.PathLike, teacher: str | None = None) -> None:
    """
    Writes [`to_sentence_transformer`] of a saved model to `output_dir`. A backbone that is only on this machine is written
    too, whatever `store_backbone` says: the folder would not load elsewhere.

    Raises:
        `FileExistsError`: if `output_dir` is not empty.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} exists; name a new or empty directory")
    model, local = load_model(model_dir, dtype="auto"), local_paths(model_dir)  # in the precision that it is stored in
    model.config.store_backbone |= "backbone" in local
    to_sentence_transformer(model, teacher or local.get("teacher")).save(str(output_dir))


@one_line_errors("export")
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("python -m native_retrieval.export", __doc__)
    parser.add_argument("model", help="folder or Hub id of a model that train.py wrote")
    parser.add_argument("output", help="a new folder")
    parser.add_argument("--teacher", help="name or path of the teacher, if it has moved since training")
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    export(arguments.model, arguments.output, arguments.teacher)
    print(f"Written: {arguments.output}. Load it: SentenceTransformer({arguments.output!r}, trust_remote_code=True)")


if __name__ == "__main__":
    sys.exit(main())
