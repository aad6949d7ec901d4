"""benchmarks/plain_texts.py, on made-up collections: what it keeps, and what it must not."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import plain_texts

HELD_OUT = ("zanzibar", "ocarina", "umiak")  # words of conversations that must not be learned
PYTHON = '''
"""A module that is long enough to be read, as everything below two hundred characters is left out."""


def read_bridge_heights(path, unit="metres"):
    """Reads the heights of all bridges from a file."""
    heights = [float(line) for line in open(path)]
    return heights


class BridgeTable:
    """A table of bridges and of their heights."""

    def sort_by_height(self):
        return sorted(self.rows)
'''
LEADS = {
    "Ada Crowe": "Ada Crowe (born 4 May 1840) was an English engineer. She built the bridge of Arnwick.",
    "Arnwick": "Arnwick is a port town in the north. Its lighthouse was founded in 1874 by two brothers.",
    "Belford": "Belford is a city in the south.",
    "Bridge": " ".join(f"A bridge of kind {number} carries a road over water." for number in range(40)),
}
WORDNET = {
    "noun": '00001 06 n 01 harbour 0 000 | a place where ships anchor; "the harbour was full of boats"',
    "verb": '00002 29 v 01 breathe 0 000 | draw air into the lungs; "breathe the fresh air"',
    "adj": "00003 00 a 01 windy 0 000 | with much wind",
    "adv": "00004 02 r 01 slowly 0 000 | without speed",
}


def conversation(name: str, *said: str) -> list[dict]:
    """The queries of a conversation, one for each user's turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return [
        {
            "_id": f"{name}_{number}",
            "messages": turns[: 2 * number + 1],
            "rewrite": f"{said[2 * number]} ({name})",
            "metadata": {"conv": name},
        }
        for number in range((len(said) + 1) // 2)
    ]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags that name the sources."""
    data = tmp_path / "data"
    for name in plain_texts.LICENCES:
        asked = conversation(
            f"{name}1", f"Who built the {name} bridge?", "Ada Crowe built it in 1874.", "How high is it?"
        )
        write(data / name / "queries.jsonl.gz", asked)
    dev = conversation(
        "dev1", "How do I get to Zanzibar?", "With an umiak from the coast.", "Is there a quokka on the way?"
    )
    trained = conversation("train1", "Where is the lighthouse?", "In Arnwick.", "Is there a quokka on the way?")
    write(data / "qrecc" / "queries.jsonl.gz", [*dev, *trained])
    (data / "qrecc" / "qrels").mkdir()
    (data / "qrecc" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\ndev1_1\td1\t1\n")
    same = conversation("same", "how do I get to Zanzibar?", "Play the ocarina.", "And then?")  # as one of dev begins
    write(
        data / "canard" / "queries.jsonl.gz",
        [*same, *conversation("canard1", "Who is Ada Crowe?", "An engineer.", "When?")],
    )
    write(
        data / plain_texts.LEADS / "corpus.jsonl.gz",
        [{"_id": t, "title": t, "text": text} for t, text in LEADS.items()],
    )
    write(data / plain_texts.LEADS / "queries.jsonl.gz", conversation("topic", "What does an ocarina cost?"))
    write(data / "zero_shot" / "cast21" / "queries.jsonl.gz", conversation("zero", "Who sells an ocarina?"))
    write(
        data / "zero_shot" / "cast21" / "corpus.jsonl.gz",
        [{"_id": "1", "title": "Umiak", "text": "An umiak is a boat."}],
    )
    (tmp_path / "wordnet").mkdir()
    for part, line in WORDNET.items():
        (tmp_path / "wordnet" / f"data.{part}").write_text(f"  1 a licence\n{line}\n")
    packages = "Package: bridges\nDescription-md5: 0\nDescription-en: counts bridges\n It counts all bridges. It is fast enough.\n\n"
    (tmp_path / "Translation-en").write_text(packages)
    (tmp_path / "python" / "bridges-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "python" / "bridges.py").write_text(PYTHON)
    (tmp_path / "python" / "bridges-1.0.dist-info" / "METADATA").write_text(
        "Name: bridges\nSummary: Heights of bridges\n\n"
    )
    monkeypatch.setattr(plain_texts.sysconfig, "get_path", lambda name: str(tmp_path / "python"))
    monkeypatch.setattr(plain_texts, "MOST", 300)
    return [
        *("--data", str(data), "--wordnet", str(tmp_path / "wordnet"), "--packages", str(tmp_path / "Translation-en")),
    ]


def collect(sources: list[str], output: Path) -> dict[str, list[str]]:
    assert plain_texts.main([*sources, "--output", str(output)]) in (0, None)
    return {file.stem: file.read_text().splitlines() for file in sorted(output.glob("*.txt"))}


def test_nothing_held_out_nothing_twice_and_all_kinds(sources: list[str], tmp_path: Path):
    kinds = collect(sources, tmp_path / "texts")
    texts = [text for texts in kinds.values() for text in texts]
    assert not [text for text in texts if any(word in text.lower() for word in HELD_OUT)]
    assert "Is there a quokka on the way?" not in texts, "a question of dev, which train has too"
    assert len(texts) == len(set(texts))
    assert all(kinds.values()) and len(kinds) == 11
    assert "Who is Ada Crowe?" in kinds["turns"] and "Where is the lighthouse?" in kinds["turns"]
    assert "harbour: a place where ships anchor" in kinds["wordnet"] and "bridges: counts bridges" in kinds["packages"]
    assert "BridgeTable: A table of bridges and of their heights." in kinds["docstrings"]
    about = json.loads((tmp_path / "texts" / "sources.json").read_text())
    assert about["counts"] == {kind: len(texts) for kind, texts in kinds.items()} and about["total"] == len(texts)
    assert set(plain_texts.LICENCES) <= set(about["licences"])


def test_the_same_every_time(sources: list[str], tmp_path: Path):
    assert collect(sources, tmp_path / "one") == collect(sources, tmp_path / "two")


def test_a_missing_source_is_named_in_one_line(sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    for flag, place in (("--data", 1), ("--wordnet", 3), ("--packages", 5)):
        words = [*sources, "--output", str(tmp_path / "texts")]
        words[place] = str(tmp_path / "nowhere")
        assert plain_texts.main(words) == 2
        said = capsys.readouterr().err.strip()
        assert flag in said and "nowhere" in said and "\n" not in said
    (tmp_path / "data" / "pacific" / "queries.jsonl.gz").unlink()
    assert plain_texts.main([*sources, "--output", str(tmp_path / "texts")]) == 2
    assert "pacific" in capsys.readouterr().err
    assert not (tmp_path / "texts").exists(), "nothing is half written"


def test_what_is_not_given_is_skipped_and_said(sources: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    kinds = collect(sources[:2], tmp_path / "texts")
    said = capsys.readouterr().out
    assert "wordnet: skipped, as --wordnet names nothing" in said and "packages: skipped" in said
    assert not {"wordnet", "packages"} & kinds.keys() and kinds["templates"]
