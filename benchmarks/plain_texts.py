# Copyright 2026 The Native Retrieval authors. Licensed under the Apache License, Version 2.0.
"""
Collects plain short texts of many kinds, for training a small sentence encoder towards the vectors of a larger one.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    python benchmarks/plain_texts.py --data ../shared/data --wordnet wordnet/usr/share/wordnet \\
        --packages lists/*Translation-en --output texts

Writes a file a kind, one text a line, and sources.json with their counts and licences. No text is there twice. Of the
training collections only the train split is read: a conversation with a query of dev or test, or with the same first
message as one, is left out, and so is every text that is a question or a rewrite of dev or test.
"""

import calendar
import gzip
import json
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bm25s.stopwords import STOPWORDS_EN_PLUS

from benchmarks.text_sources import flat, package_texts, python_texts, sentences, wordnet_texts
from native_retrieval.cli import CommandParser, one_line_errors

LICENCES = {
    "canard": "CC BY-SA 4.0", "qrecc": "CC BY-SA 3.0", "doc2dial": "CC BY 3.0", "sgd": "CC BY-SA 4.0",
    "orsharc": "CC BY-SA 3.0", "gecor": "CC BY 4.0", "cast22": "MIT", "pacific": "MIT", "sealtools": "Apache-2.0",
    "apigen": "Apache-2.0", "medquad": "CC BY 4.0",
}  # fmt: skip
LEADS = "topiocqa_lead"  # its corpus only, which is Wikipedia's
OTHER_LICENCES = {
    f"{LEADS}, corpus": "CC BY-SA 4.0",
    "WordNet 3.0": "WordNet licence",
    "Debian's package descriptions": "each package's own",
    "installed Python packages": "each package's own, mostly MIT, BSD and Apache-2.0",
}
FUNCTION_WORDS = frozenset(STOPWORDS_EN_PLUS)
WORD = re.compile(r"[A-Za-z0-9][\w'’.+#-]*[\w+#]|[A-Za-z0-9]")
PERSON = re.compile(
    r"\((?:[^()]*\b(?:born|c\.) [^()]*|[^()]*\d+[^()]*[–-][^()]*\d+[^()]*)\)"
    r"[^.]{0,20}? (?:was|is) an? [^.]{0,60}?(?:er|or|ist|ian|man|poet|king|queen|ess|general|leader)\b"
)
CITY = re.compile(r"\b(?:is|was) (?:an?|the) [^.]{0,60}?\b(?:city|town|capital|village|municipality|metropolis)\b")
MONTHS = calendar.month_name[1:]
MOST = 150_000  # texts of a kind that is made up
TEMPLATES = Path(__file__).with_name("question_templates.txt").read_text(encoding="utf-8").splitlines()


def rows(path: Path) -> Iterator[dict]:
    """The lines of a collection's file."""
    if not path.is_file():
        raise ValueError(f"--data: {path} is missing; name the folder of the training collections")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def words(text: str) -> list[str]:
    """The words of a text that say something."""
    return [word for word in WORD.findall(text) if len(word) >= 3 and word.lower() not in FUNCTION_WORDS]


def passages(parts: Iterable[str], rng: random.Random) -> Iterator[str]:
    """Parts joined into texts of 60 to 180 words."""
    held: list[str] = []
    wanted = rng.randint(60, 150)
    for part in parts:
        held += part.split()
        if len(held) >= wanted:
            yield " ".join(held[:180])
            held, wanted = [], rng.randint(60, 150)


def conversations(data: Path) -> tuple[list[dict], set[str]]:
    """The queries of train, and the questions and rewrites that are held out."""
    kept, held_out = {}, {}
    for name in LICENCES:
        queries = list(rows(data / name / "queries.jsonl.gz"))
        ids = set()
        for split in ("dev", "test"):
            if (file := data / name / "qrels" / f"{split}.tsv").is_file():
                ids |= {line.split("\t")[0] for line in file.read_text(encoding="utf-8").splitlines()[1:]}
        closed = {row["metadata"]["conv"] for row in queries if row["_id"] in ids}
        for row in queries:
            row["said"] = [text for turn in row["messages"] if (text := flat(str(turn["content"])))]
            row["asked"] = flat(next(m["content"] for m in reversed(row["messages"]) if m["role"] == "user"))
            row["name"], row["conv"] = name, (name, row["metadata"]["conv"])
            (held_out if row["metadata"]["conv"] in closed else kept)[name, row["_id"]] = row
    forbidden = {flat(text) for row in held_out.values() for text in (row["asked"], row.get("rewrite") or "")}
    firsts = {row["said"][0].lower() for row in held_out.values() if len(row["said"][0].split()) >= 4}
    closed = {row["conv"] for row in kept.values() if row["said"][0].lower() in firsts}
    queries = [row for row in kept.values() if row["conv"] not in closed]
    return queries, {text for text in forbidden if len(text.split()) >= 5}


def filled_templates(fillings: dict[str, list[str]], rng: random.Random) -> Iterator[str]:
    """Templates in turn, endlessly. A number after a slot's name only tells two slots of a kind apart."""

    def fill(slot: re.Match) -> str:
        if slot[1] in ("date", "time", "year", "number"):
            day, month, year = rng.randint(1, 28), rng.randint(0, 11), rng.randint(1850, 2026)
            date = rng.choice(
                [f"{MONTHS[month]} {day}", f"{day} {MONTHS[month]} {year}", f"{year}-{month + 1:02}-{day:02}"]
            )
            time = f"{rng.randint(1, 12)}{rng.choice([':00', ':15', ':30', ':45'])} {rng.choice(['am', 'pm'])}"
            number = str(rng.choice([rng.randint(1, 12), rng.randint(1, 2000)]))
            return {"date": date, "time": time, "year": str(year), "number": number}[slot[1]]
        return rng.choice(fillings[slot[1]])

    while True:
        yield from (re.sub(r"\{([a-z]+)\d?\}", fill, template) for template in rng.sample(TEMPLATES, len(TEMPLATES)))


def keyword_bags(texts: list[str], titles: list[str], rng: random.Random) -> Iterator[str]:
    """Two to ten words of a text, mostly in their order."""
    for text in texts:
        found = words(text)
        if len(found) >= 2:
            kept = sorted(rng.sample(range(len(found)), min(len(found), rng.randint(2, 10))))
            bag = [found[i] for i in kept]
            if rng.random() < 0.2:
                rng.shuffle(bag)
            bag = [rng.choice(titles), *bag] if rng.random() < 0.15 else bag
            joined = " ".join(bag)
            yield joined.lower() if rng.random() < 0.5 else joined


def questions_with_words(queries: list[dict], rng: random.Random) -> Iterator[str]:
    """A question and up to six words of what was said before it, in eight rounds over the conversations."""
    several = [(row["asked"], words(" ".join(row["said"][:-1]))) for row in queries if len(row["said"]) > 1]
    for _ in range(8):
        for asked, history in rng.sample(several, len(several)):
            if history:
                chosen = sorted(rng.sample(range(len(history)), min(len(history), rng.randint(1, 6))))
                yield " ".join([asked, *dict.fromkeys(history[i] for i in chosen)])


class Collection:
    """Texts by kind. A text that another kind has, or that is forbidden, is not added."""

    def __init__(self, forbidden: set[str]) -> None:
        self.kinds: dict[str, list[str]] = {}
        self.seen = set(forbidden)

    def add(self, kind: str, texts: Iterable[str], limit: int | None = None) -> None:
        self.kinds[kind] = list(islice(self.new(texts), limit))
        print(f"{kind}: {len(self.kinds[kind]):,}", flush=True)

    def new(self, texts: Iterable[str]) -> Iterator[str]:
        for text in map(flat, texts):
            letters = sum(map(str.isalpha, text))
            if 2 * letters > len(text) and len(text) <= 2000 and text not in self.seen:
                self.seen.add(text)
                yield text

    def write(self, output: Path, rng: random.Random) -> None:
        output.mkdir(parents=True, exist_ok=True)
        for kind, texts in self.kinds.items():
            rng.shuffle(texts)
            (output / f"{kind}.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        counts = {kind: len(texts) for kind, texts in self.kinds.items()}
        about = {"counts": counts, "total": sum(counts.values()), "licences": LICENCES | OTHER_LICENCES}
        (output / "sources.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        print(f"{output}: {about['total']:,} texts")


@one_line_errors("plain_texts.py")
def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("plain_texts.py", __doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the training collections")
    parser.add_argument("--wordnet", type=Path, help="folder of WordNet's data files; without it, they are skipped")
    parser.add_argument(
        "--packages", type=Path, nargs="*", default=[], help="Debian's Translation-en lists; or skipped"
    )
    parser.add_argument("--python_files", type=int, default=10_000, help="how many installed Python files to read")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    for flag, wanted in (("wordnet", [arguments.wordnet]), ("packages", arguments.packages)):
        for path in filter(None, wanted):
            if not path.exists():
                raise ValueError(f"--{flag}: {path} is missing; name another, or leave the flag out")
    warnings.simplefilter("ignore", SyntaxWarning)
    rng = random.Random(0)
    queries, forbidden = conversations(arguments.data)
    collection = Collection(forbidden)
    turns = [turn for row in queries for turn in [*row["said"], flat(row.get("rewrite") or "")]]
    collection.add("turns", (t for turn in turns for t in ([turn] if len(turn.split()) <= 60 else sentences(turn))))
    collection.add("questions_with_words", questions_with_words(queries, rng), MOST)

    leads = {row["title"]: flat(row["text"]) for row in rows(arguments.data / LEADS / "corpus.jsonl.gz")}
    documents = list(leads.items())
    for name in LICENCES:
        if (file := arguments.data / name / "corpus.jsonl.gz").is_file():
            documents += [(row["title"], row["text"]) for row in rows(file)]
    split = [(title, sentences(text)) for title, text in documents]
    headed = [f"{title}. {said[0]}" for title, said in split if title and said]
    collection.add("corpus", [*(text for _, said in split for text in said), *headed])

    glosses, lemmas, nouns, to_do = wordnet_texts(arguments.wordnet) if arguments.wordnet else ([], [], [], [])
    descriptions, long, packages = package_texts(arguments.packages)
    for kind, texts, flag in (("wordnet", glosses, "--wordnet"), ("packages", descriptions, "--packages")):
        if texts:
            collection.add(kind, texts)
        else:
            print(f"{kind}: skipped, as {flag} names nothing")
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    docs, code, identifiers = python_texts(folders, arguments.python_files, rng)
    collection.add("docstrings", docs)
    collection.add("code", rng.sample(code, len(code)), 60_000)

    titles = [title for title in leads if title] or ["it"]
    names = [name.partition(" (")[0] for name in titles]
    slots = {
        "person": [n for n, (t, lead) in zip(names, leads.items(), strict=True) if PERSON.search(lead[:200]) and len(t.split()) < 5],
        "city": [name for name, lead in zip(names, leads.values(), strict=True) if CITY.search(lead[:200])],
        "thing": names,
        "noun": nouns or names,
        "do": to_do or ["look it up"],
        "package": packages or names,
        "snake": [name for name in identifiers if "_" in name.strip("_")],
        "camel": [re.sub(r"_+([a-z])", lambda m: m[1].upper(), name.strip("_")) for name in identifiers if "_" in name.strip("_")],
    }  # fmt: skip
    collection.add("templates", filled_templates(slots, rng), MOST)
    pool = [text for kind in ("turns", "corpus", "wordnet", "packages") for text in collection.kinds.get(kind, [])]
    collection.add("keywords", keyword_bags(rng.sample(pool, len(pool)), names, rng), MOST)
    alone = [name for name in dict.fromkeys([*titles, *lemmas, *packages]) if len(name.split()) <= 4]
    lists = (" ".join(rng.sample(alone, rng.randint(2, 4))) for _ in range(50_000))
    several = [text for text in lists if len(text.split()) <= 6]
    collection.add("names", [*rng.sample(alone, min(len(alone), 110_000)), *several], MOST)
    parts = [row["said"] for row in queries] + [said for _, said in split] + [sentences(text) for text in long]
    parts = [passages(part, rng) for part in parts for _ in range(4)]  # each cut in four ways
    collection.add("long", (text for part in rng.sample(parts, len(parts)) for text in part), 60_000)
    collection.write(arguments.output, rng)


if __name__ == "__main__":
    sys.exit(main())
