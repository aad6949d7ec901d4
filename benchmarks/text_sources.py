# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""What plain_texts.py reads: WordNet, Debian's package lists and Python files, cut into short texts and names."""

import ast
import random
import re
from pathlib import Path

SENTENCE_END = re.compile(r"""(?<=[.!?])(?<!\b[A-Z]\.)(?<!\be\.g\.)(?<!\bi\.e\.)["')]?\s+(?=["'(A-Z0-9])""")
RANKS = ("genus", "family", "order", "class", "subclass", "suborder", "subfamily", "superfamily", "phylum")


def flat(text: str) -> str:
    return " ".join(text.replace("\u200b", "").split())


def sentences(text: str, longest: int = 60) -> list[str]:
    """Sentences of at least three words; of a longer one, its beginning."""
    parts = (part.strip(" *#•-").split() for part in SENTENCE_END.split(flat(text)))
    return [" ".join(part[:longest]) for part in parts if len(part) >= 3]


def wordnet_texts(folder: Path) -> tuple[list[str], list[str], list[str], list[str]]:
    """Glosses with examples, all lemmas, nouns, and things to do, as in "hold your breath"."""
    texts, lemmas, nouns, to_do = [], [], [], []
    for part in ("noun", "verb", "adj", "adv"):
        if not (file := folder / f"data.{part}").is_file():
            raise ValueError(f"--wordnet: {file} is missing; name the folder with WordNet's data files")
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue
            fields, _, gloss = line.partition(" | ")
            fields = fields.split()
            own = [w.partition("(")[0].replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            said = re.findall(r'"([^"]{8,})"', gloss)
            meaning = flat(re.split(r'[;:]? *"', gloss)[0]).strip(" ;:")
            texts += [meaning, *said, *(f"{lemma}: {meaning}" for lemma in own[:3])]
            lemmas += own
            nouns += [w for w in own[:2] if part == "noun" and w.islower() and w.split()[0] not in RANKS]
            if part == "verb":
                verbs = {lemma.split()[0] for lemma in own}
                to_do += [text for text in said if text.split()[0] in verbs and 2 <= len(text.split()) <= 8]
    return texts, lemmas, nouns, to_do


def package_texts(files: list[Path]) -> tuple[list[str], list[str], list[str]]:
    """Short descriptions and sentences of the long ones, passages, and names of packages."""
    texts, long, names = [], [], []
    for file in files:
        for entry in file.read_text(encoding="utf-8").split("\n\n"):
            found = re.match(r"Package: (\S+)\n(?:.*\n)*?Description-en: (.+)\n?((?: .*\n?)*)", entry)
            if found:
                name, short, rest = found.groups()
                parts = [flat(part) for part in re.split(r"\n \.\n|\n +[*o-] ", rest)]
                said = [text for part in parts for text in sentences(part)]
                texts += [short, f"{name}: {short}", *said]
                long.append(" ".join(said))
                names.append(name)
    return texts, long, names


def python_texts(folders: list[Path], count: int, rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Docstrings, code and identifiers of Python files, and what the packages say of themselves."""
    docs, code, identifiers = [], [], []
    for file in sorted({file for folder in folders for file in folder.glob("**/*.dist-info/METADATA")}):
        head, _, body = file.read_text(encoding="utf-8", errors="ignore").partition("\n\n")
        name = re.search(r"^Name: (.+)$", head, re.M)
        for summary in re.findall(r"^Summary: (.{8,})$", head, re.M):
            docs += [summary, f"{name[1]}: {summary}"] if name else [summary]
        prose = [line for line in re.split(r"\n\s*\n", body) if re.match(r"[A-Z][a-z]* [^<>|`=]{20,}$", line.strip())]
        docs += [text for part in prose[:12] for text in sentences(part)]
    files = {
        file for folder in folders for file in folder.glob("**/*.py") if "test" not in str(file.relative_to(folder))
    }
    for file in rng.sample(sorted(files), min(count, len(files))):
        try:
            source = file.read_text(encoding="utf-8")
            if not 200 < len(source) < 120_000:
                continue
            tree, lines = ast.parse(source), source.splitlines()
        except (ValueError, SyntaxError, OSError, RecursionError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                continue
            doc, is_class = ast.get_docstring(node), isinstance(node, ast.ClassDef)
            body = node.body[1:] if doc else node.body
            if body and not node.name.startswith("__"):
                identifiers.append(node.name)
                signature = lines[node.lineno - 1 : node.body[0].lineno - 1]
                begun = [*signature, *lines[body[0].lineno - 1 : body[0].lineno + rng.randint(0, 6)]]
                begun = " ".join(begun[: node.end_lineno - node.lineno + 1]).split()
                code.append(" ".join(begun[: rng.randint(6, 40)]))
            first = flat(doc.split("\n\n")[0]) if doc else ""
            if len(first.split()) < 3 or node.name.startswith("__"):
                continue
            docs += [first] if len(first.split()) <= 60 else sentences(first)
            start = (sentences(first) or [first])[0]
            arguments = "" if is_class else ", ".join(a.arg for a in node.args.args if a.arg not in ("self", "cls"))
            docs.append(f"{node.name}: {start}" if is_class else f"{node.name}({arguments}): {start}")
            docs.append(f"{' '.join(split_identifier(node.name))} {start}")
    return docs, code, identifiers


def split_identifier(name: str) -> list[str]:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).replace("_", " ").lower().split()
