"""The command `python -m native_retrieval.synthesis`."""

import sys
from dataclasses import dataclass, field, fields

from .. import synthesis
from ..cli import Parser, one_line_errors


@dataclass
class SynthesisArguments:
    corpus: str = field(metadata={"help": "corpus.jsonl (or .jsonl.gz) with _id, title and text, or its folder."})
    output: str = field(metadata={"help": "Folder to write. It must not exist yet, or be empty."})
    num_conversations: int = field(default=2000, metadata={"help": "Conversations over all splits, 3 to 6 turns each."})
    llm: str | None = field(
        default=None, metadata={"help": "Name or path of a causal LM that writes the questions. Default: templates."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the split and of the questions."})


@one_line_errors("synthesis")
def main(argv: list[str] | None = None) -> None:
    groups = {"options": [field.name for field in fields(SynthesisArguments)]}
    parser = Parser(
        SynthesisArguments, groups, prog="python -m native_retrieval.synthesis", description=synthesis.__doc__
    )
    arguments, unused = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unused:
        raise ValueError(f"{unused[0]!r} belongs to no flag; --help lists all")
    corpus = synthesis.load_corpus(arguments.corpus)
    if arguments.llm is None:
        generator = synthesis.TemplateGenerator(arguments.seed)
    else:
        generator = _llm_generator(arguments.llm, arguments.seed)
    counts = synthesis.synthesise(corpus, arguments.output, generator, arguments.num_conversations, seed=arguments.seed)
    print(", ".join(f"{name}: {count} queries" for name, count in counts.items()))


def _llm_generator(name: str, seed: int) -> synthesis.LLMGenerator:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..loading import float32_is_faster

    dtype = torch.float32 if float32_is_faster() else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise ValueError(f"--llm {name} cannot be loaded: {error}") from error
    return synthesis.LLMGenerator(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, seed=seed)


if __name__ == "__main__":
    sys.exit(main())
