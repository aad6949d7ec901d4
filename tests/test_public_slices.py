"""The public slices, from tiny files in the formats of the releases."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.public_slices import main, shuffled_splits
from native_retrieval.data import load_queries, load_task, splits

SLICES = Path(os.environ.get("NATIVE_RETRIEVAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def qrecc_turn(conversation: int, number: int) -> dict[str, Any]:
    said = [f"{'Question' if i % 2 == 0 else 'Answer'} {conversation}.{i // 2 + 1}" for i in range(2 * number)]
    return {
        "Context": said[:-2],
        "Question": said[-2],
        "Rewrite": f"Rewritten {conversation}.{number}",
        "Answer": said[-1] if (conversation, number) != (1, 2) else "",
        "Answer_URL": "https://example.org",
        "Conversation_no": conversation,
        "Turn_no": number,
        "Conversation_source": "quac",
    }


def topiocqa_turn(conversation: int, number: int, topic: str, answer: str | None = None) -> dict[str, Any]:
    return {
        "Conversation_no": conversation,
        "Turn_no": number,
        "Question": f"question {number}?",
        "Answer": answer or f"answer {number}",
        "Topic": topic,
        "Topic_section": "Introduction",
        "Context": [],
        "Rationale": "because",
    }


def span(number: int, section: str, title: str, text: str) -> dict[str, Any]:
    return {
        "id_sp": str(number),
        "tag": "u",
        "start_sp": 100 * number,
        "end_sp": 100 * number + len(text),
        "text_sp": text,
        "title": title,
        "parent_titles": [],
        "id_sec": section,
        "start_sec": 0,
        "text_sec": "",
        "end_sec": 0,
    }


def dialogue(name: str) -> dict[str, Any]:
    def turn(number: int, role: str, text: str, *spans: int) -> dict[str, Any]:
        references = [{"sp_id": str(number), "label": "solution"} for number in spans]
        return {"turn_id": number, "role": role, "da": "respond", "references": references, "utterance": text}

    return {
        "dial_id": name,
        "doc_id": "Move house#1_0",
        "domain": "dmv",
        "turns": [
            turn(1, "user", "I have moved.", 2),
            turn(2, "agent", "Tell us within ten days.", 4, 3),
            turn(3, "agent", "Have you a car?", 3),
            turn(4, "user", "Yes."),
            turn(5, "user", "Does it cost anything?"),
            turn(6, "agent", "No.", 5),
            turn(7, "user", "Thanks."),
            turn(8, "agent", "You are welcome."),
            turn(9, "user", "Bye."),
        ],
    }


SPANS = [
    span(1, "t_0", "Move house", "\nAnyone who moves"),
    span(2, "0", "Move house", " must tell us ."),
    span(3, "1", "1. When", "Within ten days"),
    span(4, "1", "1. When", ", by post."),
    span(5, "2", "2. Cost", "It is free."),
]
ARTICLES = [{"_id": name, "title": name, "text": f"{name} is a town."} for name in ("Arnwick", "Belford")]
TRAIN = [
    topiocqa_turn(1, 1, "Arnwick"),
    topiocqa_turn(1, 2, "Arnwick", "UNANSWERABLE"),
    topiocqa_turn(1, 3, "Nowhere"),
    topiocqa_turn(1, 4, "Belford"),
    topiocqa_turn(2, 1, "Belford"),
]
DEV = [topiocqa_turn(number, 1, "Arnwick") for number in (1, 2, 3)]


def save(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.fixture
def releases(tmp_path: Path) -> dict[str, list[str]]:
    domain = {"Move house#1_0": {"doc_id": "Move house#1_0", "title": "x", "domain": "dmv"}}
    domain["Move house#1_0"]["spans"] = {entry["id_sp"]: entry for entry in SPANS}
    dialogues = {"dmv": {"Move house#1_0": [dialogue(f"d{i}") for i in range(10)]}}
    topiocqa = [save(tmp_path / "topiocqa_train.json", TRAIN), save(tmp_path / "topiocqa_dev.json", DEV)]
    leads = tmp_path / "corpus.jsonl"
    leads.write_text("".join(json.dumps(row) + "\n" for row in ARTICLES), encoding="utf-8")
    history = ["Arnwick", "History", "Who founded it?", "I don't know."]
    canard = [
        {
            "History": history[:2],
            "QuAC_dialog_id": "C_1_0",
            "Question": history[2],
            "Question_no": 1,
            "Rewrite": "Who?",
        },
        {
            "History": history,
            "QuAC_dialog_id": "C_1_0",
            "Question": "When?",
            "Question_no": 2,
            "Rewrite": "When was it?",
        },
    ]
    qrecc = [qrecc_turn(conversation, number) for conversation in range(1, 61) for number in (1, 2)]
    return {
        "qrecc": [save(tmp_path / "qrecc_train.json", qrecc)],
        "canard": [save(tmp_path / "dev.json", canard)],
        "doc2dial": [
            save(tmp_path / "doc2dial_doc.json", {"doc_data": {"dmv": domain}}),
            save(tmp_path / "doc2dial_dial_validation.json", {"dial_data": dialogues}),
        ],
        "topiocqa_lead": [*topiocqa, str(leads)],
        "topiocqa_answer": topiocqa,
    }


def cut(name: str, releases: dict[str, list[str]], folder: Path) -> Path:
    assert main([name, *releases[name], "--output", str(folder / name)]) == 0
    return folder / name


def gold(folder: Path, split: str) -> dict[str, str]:
    task = load_task(folder, split)
    texts = {row["_id"]: row["title"] + row["text"] for row in task.corpus}
    return {row["_id"]: texts[row["gold"][0]] for row in task.queries}


def test_qrecc(releases: dict[str, list[str]], tmp_path: Path):
    folder = cut("qrecc", releases, tmp_path)
    assert splits(folder) == ["dev", "test", "train"]
    conversations = {split: set(load_queries(folder, split)["conv"]) for split in splits(folder)}
    assert sum(map(len, conversations.values())) == len(set().union(*conversations.values())) == 60
    found = {key: text for split in splits(folder) for key, text in gold(folder, split).items()}
    assert len(found) == 119 and "1_2" not in found  # it has no answer
    assert found["7_2"] == "Answer 7.2"
    (row,) = (row for row in load_queries(folder) if row["_id"] == "7_2")
    assert [m["content"] for m in row["messages"]] == ["Question 7.1", "Answer 7.1", "Question 7.2"]
    assert (row["rewrite"], row["conv"], row["turn"]) == ("Rewritten 7.2", "7", 2)
    assert (folder / "corpus.jsonl").read_text() == (
        cut("qrecc", releases, tmp_path / "again") / "corpus.jsonl"
    ).read_text()


def test_canard(releases: dict[str, list[str]], tmp_path: Path):
    folder = cut("canard", releases, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["queries.jsonl"]
    row = load_queries(folder)[1]
    assert [(m["role"], m["content"]) for m in row["messages"]] == [
        ("user", "Who founded it?"),
        ("assistant", "I don't know."),
        ("user", "When?"),
    ]
    assert (row["_id"], row["rewrite"], row["turn"], row["conv"]) == ("C_1_0_2", "When was it?", 2, "C_1_0")


def test_doc2dial(releases: dict[str, list[str]], tmp_path: Path):
    folder = cut("doc2dial", releases, tmp_path)
    assert {split: len(load_queries(folder, split)) for split in splits(folder)} == {"train": 14, "dev": 2, "test": 4}
    task = load_task(folder, "dev")
    assert task.corpus.to_list() == [
        {"_id": "0", "title": "Move house", "text": "Anyone who moves must tell us ."},
        {"_id": "1", "title": "Move house", "text": "Within ten days , by post."},
        {"_id": "2", "title": "Move house", "text": "It is free."},
    ]
    first, second = task.queries
    assert first["_id"].endswith("_1") and first["gold"] == ["1"]
    assert second["_id"].endswith("_5") and second["gold"] == ["2"]
    assert [m["role"] for m in second["messages"]] == ["user", "assistant", "assistant", "user", "user"]


def test_topiocqa(releases: dict[str, list[str]], tmp_path: Path):
    folder = cut("topiocqa_lead", releases, tmp_path)
    assert list(gold(folder, "train")) == ["train_1_1", "train_1_4", "train_2_1"]
    assert list(gold(folder, "dev")) == ["dev_2_1"] and list(gold(folder, "test")) == ["dev_1_1", "dev_3_1"]
    queries = load_queries(folder, "train")
    assert queries["switch"][:] == [False, True, False]
    assert len(queries[1]["messages"]) == 7 and queries[1]["messages"][3]["content"] == "UNANSWERABLE"

    folder = cut("topiocqa_answer", releases, tmp_path)
    found = gold(folder, "train")
    assert found["train_1_3"] == "Nowhere | Introduction | answer 3" and len(found) == 4
    assert len(load_task(folder, "dev").corpus) == 4  # the answers of dev are one text, which train has as well
    assert load_queries(folder, "train")["switch"][:] == [False, True, True, False]


@pytest.mark.parametrize("name", ["qrecc", "canard", "doc2dial", "topiocqa_lead", "topiocqa_answer"])
def test_other_files_are_named(name: str, releases: dict[str, list[str]], tmp_path: Path, capsys):
    files = releases[name]
    for content, says in (
        ("[", "JSON"),
        ("[]", "JSON"),
        ("{}", "JSON"),
        ('[{"a": 1}]', "--help"),
        ('{"a": 1}', "--help"),
    ):
        (tmp_path / "other.json").write_text(content)
        words = [str(tmp_path / "other.json"), *files[1:]]
        assert main([name, *words, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "other.json" in error and says in error and error.count("\n") == 1
    assert main([name, *files, files[0], "--output", str(tmp_path / "out")]) == 2
    assert f"{name} needs {len(files)} files" in capsys.readouterr().err
    assert main([name, *files, "--output", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not (SLICES / "doc2dial").is_dir(), reason=f"no research slices at {SLICES}: set NATIVE_RETRIEVAL_DATA"
)
def test_the_splits_are_those_of_the_tables():
    found = {c: split for split in ("train", "dev", "test") for c in load_queries(SLICES / "doc2dial", split)["conv"]}
    assert shuffled_splits(found) == found
    for split, odd in (("dev", 0), ("test", 1)):
        assert {int(conv) % 2 for conv in load_queries(SLICES / "topiocqa_lead", split)["conv"]} == {odd}
