"""The Trainer: what it optimises, logs, keeps and resumes; and train.py from the command line."""

import copy
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from fuzz import check_recipe, recipes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset
from transformers import AutoModel

import train
from configuration_native_retrieval import NativeRetrievalConfig
from native_retrieval.data import load_task
from native_retrieval.dataset import PROMPT_KEYS, build_examples, build_texts, collate, turned_away
from native_retrieval.losses import alignment_loss, contrastive_loss
from native_retrieval.trainer import NativeRetrievalTrainer, NativeRetrievalTrainingArguments


@pytest.fixture
def examples(tiny_model, stub_teacher, beir_folder, tmp_path):
    def build(split="train", mode="context", **settings):
        task = load_task(beir_folder, split)
        return build_examples(
            tiny_model,
            stub_teacher,
            task.queries,
            task.corpus,
            mode,
            cache_dir=str(tmp_path / "cache"),
            rank_top_k=8,
            name=split,
            **settings,
        )

    return build


def arguments(tmp_path, **fields):
    fields = {
        "output_dir": str(tmp_path / "out"),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        **fields,
    }
    return NativeRetrievalTrainingArguments(**fields)


def head(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("backbone.")}


def test_cached_and_online_features_give_the_same_loss(tiny_model, examples, tmp_path):
    trainer = NativeRetrievalTrainer(tiny_model, arguments(tmp_path, eval_strategy="no", load_best_model_at_end=False))
    losses = []
    for online in (False, True):
        dataset = examples(online_features=online)
        batch = collate([dataset[i] for i in range(4)])
        tiny_model.eval()
        losses.append(trainer.compute_loss(tiny_model, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)  # the cache is bfloat16


def test_parts_are_logged_and_add_up_to_the_loss(tiny_model, examples, tmp_path):
    args = arguments(tmp_path, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
    trainer = NativeRetrievalTrainer(tiny_model, args, examples())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged
    for entry in logged:
        total = 2 * entry["alignment_loss"] + entry["contrastive_loss"] + entry["rank_loss"]
        assert float(entry["loss"]) == pytest.approx(total, abs=2e-3)
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"])


WANTED_IN_LOGS = ("alignment_loss", "contrastive_loss", "rank_loss", "queries_per_second")


def test_tensorboard_gets_loss_parts_dev_metrics_and_throughput(tiny_model, examples, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = NativeRetrievalTrainer(
        tiny_model, arguments(tmp_path, report_to="tensorboard"), examples(), examples("dev")
    )
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = set(board.Tags()["scalars"])
    assert {f"train/{name}" for name in WANTED_IN_LOGS} | {"eval/recall@10", "eval/mrr@10"} <= tags
    assert board.Scalars("train/queries_per_second")[-1].value > 0


def test_a_weight_of_zero_leaves_the_part_out(tiny_model, examples, tmp_path):
    args = arguments(tmp_path, contrastive_weight=0.0, eval_strategy="no", load_best_model_at_end=False)
    trainer = NativeRetrievalTrainer(tiny_model, args)
    batch = collate([examples()[i] for i in range(4)])
    assert set(trainer.loss_parts(batch["targets"], batch)) == {"alignment", "rank"}


def test_a_short_ranking_counts_as_it_would_alone_and_none_at_all_as_right(tiny_model, examples, tmp_path):
    args = arguments(tmp_path, eval_strategy="no", load_best_model_at_end=False)
    trainer = NativeRetrievalTrainer(tiny_model, args)
    dataset, vectors = examples(), torch.nn.functional.normalize(torch.randn(3, 32), dim=-1)
    whole, short, none = dataset[0], dataset[1], dataset[2]
    short["ranking"] = short["ranking"][:3]
    del none["ranking"]

    def rank(rows, *items) -> float:
        return trainer.loss_parts(vectors[rows], collate(items))["rank"].item()

    alone = rank([0], whole), rank([1], short)
    assert min(alone) > 0
    assert rank([0, 1, 2], whole, short, none) == pytest.approx(sum(alone) / 3, rel=1e-4)


def test_gradient_accumulation_equals_the_larger_batch(tiny_model, examples, tmp_path):
    # InfoNCE is left out: its negatives are those of one step.
    dataset, before, after = examples(), head(tiny_model), []
    for size, steps in ((8, 1), (1, 8)):
        tiny_model.load_state_dict(before, strict=False)
        tiny_model.config.head_dropout = 0.0
        for module in tiny_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.0
        args = arguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            contrastive_weight=0.0,
            max_steps=1,
            optim="sgd",
            learning_rate=1e-1,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
        )
        subset = torch.utils.data.Subset(dataset, range(8))
        NativeRetrievalTrainer(tiny_model, args, subset).train()
        after.append(head(tiny_model))
    moved = max((after[0][k] - before[k]).abs().max().item() for k in before)
    apart = max((after[0][k] - after[1][k]).abs().max().item() for k in before)
    assert moved > 1e-4
    assert apart < 1e-3 * moved + 1e-7


def test_several_dev_sets_are_logged_with_their_mean(tiny_model, examples, tmp_path):
    dev = {"a": examples("dev"), "b": examples("test")}
    trainer = NativeRetrievalTrainer(tiny_model, arguments(tmp_path), examples(), dev)
    metrics = trainer.evaluate()
    for name in ("recall@10", "mrr@10", "ndcg@10"):
        mean = (metrics[f"eval_a_{name}"] + metrics[f"eval_b_{name}"]) / 2
        assert metrics[f"eval_{name}"] == trainer.state.log_history[-1][f"eval_{name}"] == pytest.approx(mean)


def test_dev_metrics_are_those_of_brute_force(tiny_model, examples, tmp_path):
    dev = examples("dev")
    trainer = NativeRetrievalTrainer(tiny_model, arguments(tmp_path), examples(), dev)
    metrics = trainer.evaluate()
    with torch.no_grad():
        vectors = tiny_model(
            **{k: v for k, v in collate([dev[i] for i in range(len(dev))]).items() if k in MODEL_INPUTS}
        )
    scores = vectors.query_embeddings.numpy() @ np.asarray(dev.documents).T
    ranks = [1 + int((row > row[gold[0]]).sum()) for row, gold in zip(scores, dev.positives, strict=True)]
    assert metrics["eval_recall@10"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]), abs=1e-6)
    assert metrics["eval_mrr@10"] == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]), abs=1e-6)


MODEL_INPUTS = ("input_ids", "attention_mask", "readout_mask", "hidden_states")


def test_resuming_ends_where_an_undisturbed_run_does(tiny_model, examples, tmp_path):
    dataset, dev, before = examples(), examples("dev"), head(tiny_model)
    ends = []
    for stop in (False, True):
        tiny_model.load_state_dict(before, strict=False)
        args = arguments(tmp_path, output_dir=str(tmp_path / f"run-{stop}"), save_total_limit=None, seed=3)
        trainer = NativeRetrievalTrainer(tiny_model, args, dataset, dev)
        trainer.train()
        if stop:
            first = sorted((tmp_path / f"run-{stop}").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[0]
            assert not any(k.startswith("backbone") for k in _keys(first / "model.safetensors"))
            trainer = NativeRetrievalTrainer(tiny_model, args, dataset, dev)
            trainer.train(resume_from_checkpoint=str(first))
        ends.append(head(tiny_model))
    assert max((ends[0][k] - ends[1][k]).abs().max().item() for k in before) < 1e-5


def _keys(path):
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        return list(file.keys())


def test_a_checkpoint_of_another_head_is_refused(tiny_model, examples, tmp_path):
    trainer = NativeRetrievalTrainer(tiny_model, arguments(tmp_path, num_train_epochs=1), examples(), examples("dev"))
    trainer.train()
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path):
    assert train.last_whole_checkpoint(tmp_path / "nothing") is None
    for step, whole in ((9, True), (10, True), (100, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_text("")
        if whole:
            (folder / "trainer_state.json").write_text("{}")
    assert train.last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_full_disk_is_one_line(tiny_model, examples, tmp_path, monkeypatch):
    import safetensors

    def full(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="could not be written.*No space left on device.*--resume"):
        NativeRetrievalTrainer(tiny_model, arguments(tmp_path), examples(), examples("dev")).train()


def test_a_loss_that_is_not_finite_stops_training(tiny_model, examples, beir_folder, tmp_path):
    args = arguments(tmp_path, eval_strategy="no", load_best_model_at_end=False)
    trainer = NativeRetrievalTrainer(tiny_model, args)
    batch = collate([examples()[i] for i in range(4)])
    batch["targets"] = batch["targets"] * float("nan")
    with pytest.raises(FloatingPointError, match="_batch-not-finite.json"):
        trainer.compute_loss(tiny_model, batch)
    kept = json.loads((tmp_path / "out" / "_batch-not-finite.json").read_text())
    named = [f"train: {query_id}" for query_id in load_task(beir_folder, "train").queries["_id"][:4]]
    assert kept["queries"] == named and kept["alignment"] == "nan"


def test_a_seed_determines_the_weights(make_model, examples, tmp_path):
    trained = []
    for run in ("one", "two"):
        model = make_model()
        args = arguments(tmp_path / run, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)
        NativeRetrievalTrainer(model, args, examples(num_hard_negatives=2)).train()
        trained.append(head(model))
    assert all(torch.equal(weight, trained[1][name]) for name, weight in trained[0].items())


def test_hard_negatives_are_never_relevant(examples):
    dataset = examples(num_hard_negatives=3)
    for i in range(len(dataset)):
        assert not set(dataset.hard_negatives[i]) & set(dataset.positives[i])
    batch = collate([dataset[i] for i in range(4)])
    assert batch["negatives"].shape == (4, 3, 32) and batch["negatives_mask"].all()


def test_rows_without_hard_negatives_have_none_in_the_loss(examples):
    dataset, bare = examples(num_hard_negatives=3), examples()
    batch = collate([dataset[0], bare[1]])
    arguments = {"positive_ids": batch["positive_ids"][:, 0], "temperature": 0.05}
    queries = torch.nn.functional.normalize(torch.randn(2, 32), dim=-1)
    mixed = contrastive_loss(
        queries, batch["positives"], negatives=batch["negatives"], negative_ids=batch["negative_ids"], **arguments
    )
    batch["negatives"][1] = batch["positives"][1]
    same = contrastive_loss(
        queries, batch["positives"], negatives=batch["negatives"], negative_ids=batch["negative_ids"], **arguments
    )
    assert torch.allclose(mixed, same)


def test_generated_mode_reads_the_written_query(tiny_model, examples):
    dataset = examples(mode="generated")
    start = tiny_model.tokenizer(tiny_model.config.query_prompt, add_special_tokens=False)["input_ids"]
    for sequence, count in zip(dataset.sequences, dataset.num_read, strict=True):
        assert sequence[-count - len(start) : -count] == start


def test_what_the_model_sees_may_differ_and_the_targets_do_not(tiny_model, examples, beir_folder):
    queries = load_task(beir_folder, "train").queries
    seen = [[{"role": "system", "content": "Be brief."}, *messages] for messages in queries["messages"]]
    plain, varied = examples(), examples(seen=seen)
    assert varied.sequences == [tiny_model.build_prompt(messages) for messages in seen] != plain.sequences
    assert np.array_equal(varied.targets, plain.targets) and varied.positives == plain.positives


def test_a_changed_conversation_is_drawn_to_the_same_one_unchanged(make_model, stub_teacher, beir_folder, tmp_path):
    model = make_model(head_dropout=0.5)
    task = load_task(beir_folder, "train")

    def build(rows, **more):
        queries = task.queries.select(rows)
        return build_examples(model, stub_teacher, queries, task.corpus, "context", cache_dir=str(tmp_path), **more)

    seen = [[{"role": "system", "content": "Be brief."}, *task.queries[row]["messages"]] for row in (2, 0)]
    plain = build(range(4))
    changed = build([2, 0], seen=seen, unchanged=plain)
    args = arguments(tmp_path, consistency_weight=2.0, eval_strategy="no", load_best_model_at_end=False)
    trainer = NativeRetrievalTrainer(model, args, ConcatDataset([plain, changed]))
    batch = collate([changed[0], plain[3], changed[1]])
    assert batch["changed"].tolist() == [True, False, True]

    vectors = torch.nn.functional.normalize(torch.randn(3, model.config.embedding_dim), dim=-1).requires_grad_()
    with torch.no_grad():
        wanted = model.eval()(**{k: v for k, v in collate([plain[2], plain[0]]).items() if k in PROMPT_KEYS})
    model.train()
    loss = trainer._consistency(model, vectors, batch)
    assert model.training
    distances = 1 - (vectors[[0, 2]] * wanted.query_embeddings).sum(1)
    assert loss.item() == pytest.approx(distances.sum().item() / 3, abs=1e-5)
    loss.backward()
    assert vectors.grad[0].any() and not vectors.grad[1].any()
    assert all(parameter.grad is None for parameter in model.parameters())

    trainer.compute_loss(model, batch)
    assert "consistency_loss" in trainer._parts
    unmixed = collate([plain[0], plain[1]])
    assert trainer._consistency(model, vectors[:2], unmixed).item() == 0


def test_a_question_without_a_rewrite_takes_its_documents_title(tiny_model, stub_teacher, tmp_path):
    corpus = Dataset.from_list([{"_id": "d", "title": "Old Bridge", "text": "It was opened in 1874."}])
    questions = ["When was it opened?", "When was the old bridge opened?", "When was it opened?"]
    rows = [{"messages": [{"role": "user", "content": q}], "rewrite": None, "gold": ["d"]} for q in questions]
    rows[2]["rewrite"] = "When was the bridge opened?"
    queries = Dataset.from_list(rows)
    built = build_examples(
        tiny_model, stub_teacher, queries, corpus, "context", cache_dir=str(tmp_path), gold_share=0, rank_top_k=1
    )
    wanted = ["Old Bridge: When was it opened?", questions[1], "When was the bridge opened?"]
    assert np.allclose(built.targets, stub_teacher.encode(wanted), atol=1e-6)


def test_the_target_of_a_query_without_a_rewrite_moves_towards_its_document(tiny_model, stub_teacher, tmp_path):
    corpus = Dataset.from_list([{"_id": "d", "title": "Old Bridge", "text": "It was opened in 1874."}])
    question = "When was the old bridge opened?"
    rows = [{"messages": [{"role": "user", "content": question}], "rewrite": None, "gold": ["d"]}] * 2
    rows[1] = {**rows[1], "rewrite": question}
    built = build_examples(
        *(tiny_model, stub_teacher, Dataset.from_list(rows), corpus, "context"),
        **{"cache_dir": str(tmp_path), "gold_share": 0.25, "rank_top_k": 1},
    )
    asked, document = stub_teacher.encode([question])[0], stub_teacher.documents(corpus)[0]
    wanted = 0.75 * asked + 0.25 * document
    assert np.allclose(built.targets, [wanted / np.linalg.norm(wanted), asked], atol=1e-6)


def test_targets_are_turned_away_from_earlier_answers(tiny_model, stub_teacher, tmp_path):
    answers = ["It was opened in 1874.", "It was built by Ada Moss, an engineer."]
    texts = [*answers, "It was opened in 1874, in May."]
    corpus = Dataset.from_list([{"_id": str(i), "title": "", "text": text} for i, text in enumerate(texts)])
    messages = [
        {"role": "user", "content": "When was it opened?"},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "Who built it?"},
    ]
    rows = [{"messages": messages, "rewrite": "Who built the bridge that was opened in 1874?", "gold": ["1"]}]
    rows.append({**rows[0], "gold": ["0"]})  # asked for once more
    other = [messages[0], {"role": "assistant", "content": "It was opened in May, in 1874."}, messages[2]]
    rows.append({"messages": other, "rewrite": rows[0]["rewrite"], "gold": ["2"]})  # nearer to it than the others are

    def targets(**settings):
        built = build_examples(
            *(tiny_model, stub_teacher, Dataset.from_list(rows), corpus, "context"),
            **{"cache_dir": str(tmp_path), "rank_top_k": 3, **settings},
        )
        return built.targets

    plain, moved, said = targets(), targets(target_repulsion_threshold=0.1), stub_teacher.documents(corpus)[0]
    assert np.array_equal(moved[1:], plain[1:])
    assert plain[0] @ said > moved[0] @ said > 0 and np.allclose(np.linalg.norm(moved, axis=1), 1)
    assert np.array_equal(targets(target_repulsion_threshold=plain[0] @ said + 0.01), plain)
    shared = targets(rewrite_gold_share=0.5)
    assert (shared * stub_teacher.documents(corpus)[[1, 0, 2]]).sum(1) == pytest.approx(1, abs=0.3)
    assert ((shared - plain) ** 2).sum(1).min() > 0


def test_a_target_is_not_turned_away_from_what_is_asked_for_once_more(tiny_model, stub_teacher, tmp_path):
    """Whether the right document has been an answer before, or not: it is turned away from the others alone."""
    right, other = "It was opened in 1874 by Ada Moss.", "The bridge was built of slate."
    corpus = Dataset.from_list([{"_id": str(i), "title": "", "text": text} for i, text in enumerate((right, other))])

    def conversation(*answers):
        turns = [({"role": "user", "content": "And?"}, {"role": "assistant", "content": answer}) for answer in answers]
        return [*(message for turn in turns for message in turn), {"role": "user", "content": "Once more, when?"}]

    rows = [
        {"messages": conversation(*answers), "rewrite": "When was the bridge opened, was it 1874?", "gold": ["0"]}
        for answers in ((), (other,), (right, other))
    ]
    arguments = (tiny_model, stub_teacher, Dataset.from_list(rows), corpus, "context")
    plain, moved, repeated = build_examples(
        *arguments, cache_dir=str(tmp_path), target_repulsion_threshold=0.1, rank_top_k=2
    ).targets
    assert ((moved - plain) ** 2).sum() > 0
    assert np.allclose(moved, repeated)


@given(st.integers(1, 9), st.floats(-1, 1), st.integers(0, 2**16))
@settings(max_examples=50, deadline=None)
def test_what_is_turned_away_is_what_lies_over_the_threshold(count, threshold, seed):
    rng = np.random.default_rng(seed)
    target, *others = rng.normal(size=(count + 1, 6))
    target, others = target / np.linalg.norm(target), np.array([o / np.linalg.norm(o) for o in others])
    turned = turned_away(target, others, threshold)
    assert np.linalg.norm(turned) == pytest.approx(1, abs=1e-5)
    if (others @ target <= threshold).all():
        assert np.allclose(turned, target, atol=1e-6)
    assert np.allclose(turned_away(target, others[::-1], threshold), turned, atol=1e-5)


def test_the_head_is_to_read_the_end_of_each_prompt(examples):
    dataset = examples(mode="generated")
    batch = collate([dataset[i] for i in range(len(dataset))])
    width = batch["readout_mask"].shape[1]
    wanted = torch.tensor([[place >= width - count for place in range(width)] for count in dataset.num_read])
    assert torch.equal(batch["readout_mask"], wanted)


def test_texts_with_typos_have_the_targets_of_the_right_spelling(tiny_model, stub_teacher):
    texts = [f"the bridge over river number {i}" for i in range(10)]
    dataset = build_texts(tiny_model, stub_teacher, texts, "texts", typo_share=0.5)
    assert len(dataset) == len(dataset.targets) == len(dataset.sequences) == 15
    for sequence, target in zip(dataset.sequences[10:], dataset.targets[10:], strict=True):
        right = [i for i in range(10) if np.array_equal(dataset.targets[i], target)]
        assert right and dataset.sequences[right[0]] != sequence


def test_words_learn_from_plain_text_without_the_backbone(tiny_model, stub_teacher, tmp_path, monkeypatch):
    texts = [f"the {a} bridge over the {b} river" for a in ("old", "new", "red") for b in ("wide", "cold", "long")]
    dataset = build_texts(tiny_model, stub_teacher, texts, "texts")
    monkeypatch.setattr(tiny_model, "prefill", lambda *a, **k: pytest.fail("the backbone ran"))
    model = copy.deepcopy(tiny_model)

    def distance():
        batch = collate([dataset[i] for i in range(len(dataset))])
        with torch.no_grad():
            output = model(batch["input_ids"], batch["attention_mask"], words_only=True)
        return alignment_loss(output.query_embeddings, batch["targets"]).item()

    before = distance()
    args = NativeRetrievalTrainingArguments(
        **{"output_dir": str(tmp_path), "num_train_epochs": 10, "rank_weight": 0.0, "learning_rate": 1e-2},
        **{"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "use_cpu": True},
        token_learning_rate=1e-2,
    )
    NativeRetrievalTrainer(model, args, dataset).train()
    assert distance() < before


def test_the_vocabulary_has_a_learning_rate_of_its_own(tiny_model, examples, tmp_path):
    args = NativeRetrievalTrainingArguments(
        **{"output_dir": str(tmp_path), "learning_rate": 1e-2, "use_cpu": True, "weight_decay": 0.5},
        **{"eval_strategy": "no", "load_best_model_at_end": False},
    )
    optimizer = NativeRetrievalTrainer(copy.deepcopy(tiny_model), args, examples()).create_optimizer()
    rates = {p.shape: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[tiny_model.copy_path.token_values.weight.shape] == pytest.approx(1e-3)
    assert rates[tiny_model.head.linear_in.weight.shape] == 1e-2
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len({id(p) for p in trained}) == sum(p.requires_grad for p in tiny_model.parameters())


# -- from the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def stub_training(monkeypatch, stub_teacher):
    monkeypatch.setattr("native_retrieval.teacher.Teacher", lambda *args, **kwargs: stub_teacher)


def words(backbone_dir, beir_folder, tmp_path, *more):
    return [
        *("--backbone", str(backbone_dir), "--teacher", "stub-teacher"),
        *("--train_data", str(beir_folder), "--dev_data", str(beir_folder)),
        *("--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")),
        *(
            "--num_train_epochs",
            "1",
            "--max_prompt_tokens",
            "100",
            "--head_dim",
            "32",
            "--head_num_attention_heads",
            "4",
        ),
        *("--rank_top_k", "8", "--use_cpu", "true", "--disable_tqdm", "true", "--max_query_tokens", "8"),
        *more,
    ]


def test_train_leaves_a_model_that_loads_and_a_card(stub_training, backbone_dir, beir_folder, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("A plain sentence about rivers.\nAnother one, about old bridges.\n" * 3)
    train.main(
        words(backbone_dir, beir_folder, tmp_path, "--plain_text", str(texts), "--query_modes", "context", "generated")
    )
    out = tmp_path / "out"
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    assert model.embed_query("where is the bridge?").shape == (1, 32)
    assert model.config.teacher_fingerprint and model.config.text_config.use_cache
    card = (out / "README.md").read_text()
    assert "2603.08429" in card and "recall@10" in card.lower() and str(tmp_path) not in card.split("`train.py")[0]
    assert json.loads((out / "training.json").read_text())["dev"]
    assert not list(out.glob("checkpoint-*"))


def test_the_probe_is_trained_in_a_stage_of_its_own(stub_training, backbone_dir, beir_folder, tmp_path):
    probe = ("--query_modes", "context", "probe", "--num_probe_tokens", "3", "--adapter_rank", "2")
    train.main(words(backbone_dir, beir_folder, tmp_path, *probe, "--probe_epochs", "2", "--max_probe_queries", "8"))
    out = tmp_path / "out"
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    question = "where is the bridge?"
    assert (model.embed_query(question, mode="probe") - model.embed_query(question, mode="context")).abs().max() > 0
    dev = json.loads((out / "training.json").read_text())["dev"]
    assert any("eval_beir_context_recall@10" in entry for entry in dev)
    assert any("eval_beir_probe_recall@10" in entry for entry in dev)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--bakbone", "x"], "did you mean backbone"),
        (["no-such.yaml"], "does not exist"),
        ([], "backbone is missing"),
        (["--backbone", "b"], "teacher is missing"),
        (["--backbone", "b", "--teacher", "t"], "train_data is missing"),
        (["--backbone", "b", "--teacher", "t", "--train_data", "d"], "dev_data is missing"),
        (["--train_data", "d", "--train_weights", "1", "2"], "one number above 0 for each of the 1 entries"),
        (["--train_data", "d", "--train_weights", "1.5"], "above 1 give whole numbers"),
        (["--target_repulsion_threshold", "2"], "must lie in 0 to 1"),
        (["--query_repulsion_threshold", "2"], "must be a cosine"),
    ],
)
def test_bad_arguments_are_one_line(argv, said):
    with pytest.raises(ValueError, match=said) as raised:
        train.main(argv)
    assert "\n" not in str(raised.value)


def test_a_misspelt_recipe_field_names_the_nearest(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learnin_rate: 1\n")
    with pytest.raises(ValueError, match="learning_rate"):
        train.main([str(recipe)])


@settings(max_examples=40, deadline=None)
@given(recipes)
def test_a_recipe_is_read_or_refused_in_one_line(recipe):
    check_recipe(recipe)


def test_the_command_line_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"backbone: a\nlearning_rate: 1.0e-3\nquery_modes: [context, generated]\noutput_dir: {tmp_path}\n"
    )
    model_args, data_args, _, training_args = train.parse([str(recipe), "--backbone", "b"])
    assert (model_args.backbone, training_args.learning_rate) == ("b", 1e-3)
    assert data_args.query_modes == ["context", "generated"]


def test_data_sets_are_seen_as_often_as_their_weights_say(stub_training, backbone_dir, beir_folder, tmp_path, capfd):
    few = ("--augmentation_share", "0", "--plain_text_share", "0", "--lexical_epochs", "0")
    seen = {}
    for weight, others in (("0.5", "0"), ("1", "0"), ("3", "0"), ("3", "1")):
        more = ("--train_weights", weight, "--topic_shift_share", others, *few)
        train.main(words(backbone_dir, beir_folder, tmp_path / weight / others, *more))
        seen[weight, others] = int(re.search(r"Stage b: (\d+) examples", capfd.readouterr().out)[1])
    once = seen["1", "0"]
    assert seen["0.5", "0"] == round(0.5 * once) and seen["3", "0"] == 3 * once > 0
    assert seen["3", "1"] == 6 * once, "every conversation as often behind others"


def test_the_novelty_threshold_may_be_given(stub_training, backbone_dir, beir_folder, tmp_path, capfd):
    more = ("--query_repulsion_threshold", "0.3", "--max_steps", "1", "--lexical_epochs", "0")
    train.main(words(backbone_dir, beir_folder, tmp_path, *more))
    assert "HistoryRepulsion: away" not in capfd.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.copy_path.novelty.threshold.item() == pytest.approx(0.3)


def test_a_seed_draws_the_head_as_well_as_the_order(stub_training, backbone_dir, beir_folder, tmp_path):
    drawn = []
    still = ("--learning_rate", "0", "--lexical_epochs", "0", "--max_steps", "1", "--eval_strategy", "no")
    for run, seed in enumerate(("1", "1", "2")):
        more = (*still, "--load_best_model_at_end", "false", "--seed", seed)
        train.main(words(backbone_dir, beir_folder, tmp_path / str(run), *more))
        drawn.append(head(AutoModel.from_pretrained(tmp_path / str(run) / "out", trust_remote_code=True)))
    assert all(torch.equal(weight, drawn[1][name]) for name, weight in drawn[0].items())
    assert any(
        name.startswith("head.") and not torch.equal(weight, drawn[2][name]) for name, weight in drawn[0].items()
    )


def test_what_is_tested_on_is_not_trained_on(beir_folder, capsys):
    """Another collection may be cut from the same conversations: here it has all of them."""
    other = shutil.copytree(beir_folder, beir_folder.parent / "other")
    shutil.rmtree(other / "qrels")
    trained = train.DataArguments(train_data=[str(other), str(beir_folder)], dev_data=[str(beir_folder)])
    parts, (dev,), _ = train.load_data(trained)
    assert [len(queries) for _, queries, _ in parts] == [12, 12]
    assert (
        "other: left out 12 training queries whose conversation is in the dev or test data" in capsys.readouterr().out
    )
    seen = {id for _, queries, _ in parts for id in queries["_id"]}
    assert seen.isdisjoint(dev[1]["_id"]) and seen.isdisjoint(load_task(beir_folder, "test").queries["_id"])
    trained.train_data = [f"{beir_folder}:test"]
    assert len(train.load_data(trained)[0][0][1]) == 6


def test_the_novelty_threshold_is_the_best_on_dev(tiny_model, examples, tmp_path, monkeypatch):
    dev = {"dev_context": examples("dev"), "dev_generated": examples("dev", mode="generated")}
    trainer = NativeRetrievalTrainer(tiny_model, arguments(tmp_path), examples(), dev)
    threshold = tiny_model.copy_path.novelty.threshold
    learned, better = threshold.item(), 0.2
    for best in (learned, better):

        def evaluate(parts, best=best):
            assert list(parts) == ["dev_context"]  # the mode that the model is saved with
            return {"eval_ndcg@10": 1 - abs(threshold.item() - best)}

        monkeypatch.setattr(trainer, "evaluate", evaluate)
        assert train.choose_novelty_threshold(trainer) == pytest.approx(threshold.item()) == pytest.approx(best)
        threshold.data.fill_(learned)


def test_shipped_recipes_parse():
    for recipe in ("demo", "qrecc", "best", "paper", "ablation"):
        train.parse([f"configs/{recipe}.yaml", *(["--bf16", "false"] if recipe == "paper" else [])])


def test_a_recipe_starts_from_the_configurations_own_defaults():
    ours = {field.name: field.default for field in dataclasses.fields(train.ModelArguments)}
    theirs = {field.name: field.default for field in dataclasses.fields(NativeRetrievalConfig)}
    shared = (ours.keys() & theirs.keys()) - {
        "max_prompt_tokens"
    }  # training takes shorter prompts than the backbone may
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
