"""The commands in benchmarks/: what they would run, not what it gives."""

import random

import pytest

from benchmarks import ablation, left_out, robustness
from native_retrieval.arguments import parse
from processing_native_retrieval import check_messages

CONVERSATIONS = [
    [{"role": "user", "content": "Where is Arnwick Lighthouse?"}],
    [
        {"role": "user", "content": "Who founded Belford Museum?"},
        {"role": "assistant", "content": "Jonas Pike."},
        {"role": "user", "content": "And what is shown there?"},
    ],
]


@pytest.mark.parametrize("name", sorted(ablation.ROWS))
def test_every_row_of_an_ablation_is_a_recipe_of_its_own(name):
    rows = ablation.ROWS[name]()
    seen = {tuple(ablation.words_of(row)) for row in rows}
    assert len(seen) == len(rows) == len({row["name"] for row in rows}) >= 10
    for row in rows:
        parse(["benchmarks/configs/ablation.yaml", *ablation.words_of(row)])


@pytest.mark.parametrize("name", ["qrecc", "doc2dial", "topiocqa_lead"])
def test_what_is_left_out_is_trained_on_in_no_form(name):
    words, source = left_out.without("benchmarks/configs/best.yaml", name, [])
    _, data, _, _ = parse(words)
    assert source.endswith(name)
    for sources in (data.train_data, data.dev_data, data.plain_text):
        assert sources and not any(name.split("_")[0] in other for other in sources)
    assert len(data.train_weights) == len(data.train_data)


@pytest.mark.parametrize("name", list(robustness.VARIANTS))
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_variant_is_a_conversation_that_keeps_its_question(name, messages):
    changed = robustness.VARIANTS[name]([dict(m) for m in messages], CONVERSATIONS, random.Random(0))
    check_messages(changed)
    if name != "typos in the last turn":
        assert [m for m in changed if m["role"] == "user"][-1] == messages[-1]
    if name.startswith("at least"):
        assert sum(message["role"] == "user" for message in changed) == int(name.split()[2])
    if name != "as they are":
        assert changed != messages
