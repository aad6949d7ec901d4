"""The Trainer: what it optimises, logs, keeps and resumes; and train.py from the command line."""

import copy
import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_one_line
from datasets import Dataset
from torch.utils.data import ConcatDataset
from transformers import AutoModel

import train
from native_retrieval.arguments import DataArguments, NativeRetrievalTrainingArguments
from native_retrieval.data import load_task
from native_retrieval.dataset import PROMPT_KEYS, QuerySet, build_examples, build_texts, collate
from native_retrieval.losses import alignment_loss, contrastive_loss, loss_parts
from native_retrieval.metrics import per_query
from native_retrieval.trainer import NativeRetrievalTrainer


@pytest.fixture
def examples(tiny_model, stub_teacher, beir_folder, tmp_path):
    def build(split="train", mode="context", changed=None, **settings):
        task = load_task(beir_folder, split)
        queries = QuerySet(split, task.queries, task.corpus, task.qrels, mode, changed)
        return build_examples(tiny_model, stub_teacher, queries, data_arguments(tmp_path, **settings))

    return build


def data_arguments(tmp_path, **fields) -> DataArguments:
    return DataArguments(cache_dir=str(tmp_path / "cache"), **{"rank_top_k": 8, **fields})


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
    args = arguments(
        tmp_path,
        learning_rate=2e-3,
        num_train_epochs=10,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
    )
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


def test_a_weight_of_zero_leaves_the_part_out(examples, tmp_path):
    args = arguments(tmp_path, contrastive_weight=0.0, eval_strategy="no", load_best_model_at_end=False)
    batch = collate([examples()[i] for i in range(4)])
    assert set(loss_parts(batch["targets"], batch, args)) == {"alignment", "rank"}


def test_a_short_ranking_counts_as_it_would_alone_and_none_at_all_as_right(examples, tmp_path):
    args = arguments(tmp_path)
    dataset, vectors = examples(), torch.nn.functional.normalize(torch.randn(3, 32), dim=-1)
    whole, short, none = dataset[0], dataset[1], dataset[2]
    short["ranking"] = short["ranking"][:3]
    del none["ranking"]

    def rank(rows, *items) -> float:
        return loss_parts(vectors[rows], collate(items), args)["rank"].item()

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
    metrics = NativeRetrievalTrainer(tiny_model, arguments(tmp_path), examples(), dev).evaluate()
    scores = dev_vectors(tiny_model, dev) @ np.asarray(dev.documents).T
    ranks = [1 + int((row > row[gold[0]]).sum()) for row, gold in zip(scores, dev.positives, strict=True)]
    assert metrics["eval_recall@10"] == pytest.approx(np.mean([rank <= 10 for rank in ranks]), abs=1e-6)
    assert metrics["eval_mrr@10"] == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]), abs=1e-6)


def dev_vectors(model, dev) -> np.ndarray:
    batch = collate([dev[i] for i in range(len(dev))])
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k in PROMPT_KEYS}).query_embeddings.numpy()


@pytest.mark.parametrize("judged", ["graded", "graded, and documents that tie"])
def test_dev_metrics_are_those_of_eval_on_the_same_run(tiny_model, examples, beir_folder, tmp_path, judged):
    """Grades count in nDCG, and documents of one score are ordered by their ids."""
    rows = [f"q4_{turn}\td{number}_{turn}\t{turn - 1 + number % 3}\n" for turn in (1, 2, 3) for number in range(10)]
    rows = [row for row in rows if not row.startswith("q4_1\td4_1\t") or row.endswith("\t1\n")]
    (beir_folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    if "tie" in judged:
        path = beir_folder / "corpus.jsonl"
        rows = [json.loads(line) | {"title": "", "text": f"The same {i % 4}."} for i, line in enumerate(path.open())]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, dev = load_task(beir_folder, "dev"), examples("dev")
    assert max(grade for grades in task.qrels.values() for grade in grades.values()) > 1
    seen = NativeRetrievalTrainer(tiny_model, arguments(tmp_path), examples(), dev).evaluate()
    # One product at a time: documents that are alike have the same score, to the last bit.
    documents = np.asarray(dev.documents)
    scores = [[float(own @ vector) for own in documents] for vector in dev_vectors(tiny_model, dev)]
    run = {
        query: dict(zip(task.corpus["_id"], map(float, row), strict=True))
        for query, row in zip(task.queries["_id"], scores, strict=True)
    }
    for name, values in per_query(run, task.qrels, list(run)).items():
        assert seen[f"eval_{name}"] == pytest.approx(np.mean(values), abs=1e-6), name


def test_all_dev_queries_count_though_training_drops_its_last_batch(tiny_model, examples, tmp_path):
    dev, metrics = examples("dev"), []
    for drop in (False, True):
        args = arguments(tmp_path, dataloader_drop_last=drop, per_device_eval_batch_size=len(dev) - 1)
        trainer = NativeRetrievalTrainer(tiny_model, args, examples(), dev)
        seen = trainer.evaluate()
        assert trainer.args.dataloader_drop_last == drop
        metrics.append({name: value for name, value in seen.items() if "@10" in name or name == "eval_loss"})
    assert metrics[0] == metrics[1]


def test_a_batch_that_is_never_full_is_refused(tiny_model, examples, tmp_path):
    args = arguments(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=13)
    with pytest.raises(ValueError, match="dataloader_drop_last leaves nothing to train on: 12 examples") as error:
        NativeRetrievalTrainer(tiny_model, args, examples(), examples("dev"))
    assert_one_line(error)


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


def test_a_checkpoint_of_another_head_is_refused(make_model, examples, tmp_path):
    args = arguments(tmp_path, num_train_epochs=1)
    NativeRetrievalTrainer(make_model(), args, examples(), examples("dev")).train()
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    for fields in ({"head_num_layers": 2}, {"word_vocab_size": None}, {"encoder_num_layers": 1}):
        trainer = NativeRetrievalTrainer(make_model(**fields), args, examples(), examples("dev"))
        with pytest.raises(ValueError, match="is of another head") as error:
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert_one_line(error)
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_training_seconds_count_what_was_before_an_interruption(tiny_model, examples, tmp_path):
    args, hour = arguments(tmp_path, num_train_epochs=1), 3600
    first = NativeRetrievalTrainer(tiny_model, args, examples(), examples("dev"), started=time.monotonic() - hour)
    first.train()
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    again = NativeRetrievalTrainer(tiny_model, args, examples(), examples("dev"), started=time.monotonic() - hour)
    assert hour <= again.training_seconds < 1.5 * hour
    again.train(resume_from_checkpoint=str(checkpoint))
    assert 2 * hour <= again.training_seconds < 2.5 * hour
    fresh = NativeRetrievalTrainer(tiny_model, args, examples(), examples("dev"))
    assert fresh.training_seconds < hour


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
    changed = [[{"role": "system", "content": "Be brief."}, *messages] for messages in queries["messages"]]
    plain, other = examples(), examples(changed=iter(changed))
    assert other.sequences == [tiny_model.processor.encode(messages) for messages in changed] != plain.sequences
    assert np.array_equal(other.targets, plain.targets) and other.positives == plain.positives


def test_a_conversation_without_a_prompt_is_named(tiny_model, examples, monkeypatch):
    def refuse(messages, **kwargs):
        raise ValueError("too strange")

    monkeypatch.setattr(tiny_model.processor, "encode", refuse)
    with pytest.raises(ValueError, match="train, query q0_1: too strange"):
        examples()


def test_plain_texts_that_are_too_long_for_a_prompt_are_left_out(tiny_model, stub_teacher, tmp_path):
    texts = ["Who built it?", "a bridge and " * 60 + "a river", "What is a lathe?"]
    rows = [{"messages": [{"role": "user", "content": text}], "rewrite": text, "gold": []} for text in texts]
    tiny_model.processor.max_prompt_tokens = 100
    queries = QuerySet("plain text", Dataset.from_list(rows), plain=True)
    built = build_examples(tiny_model, stub_teacher, queries, data_arguments(tmp_path))
    assert len(built) == 2 and np.allclose(built.targets, stub_teacher.encode([texts[0], texts[2]]), atol=1e-6)


def test_a_changed_conversation_is_drawn_to_the_same_one_unchanged(make_model, stub_teacher, beir_folder, tmp_path):
    model = make_model(head_dropout=0.5)
    task = load_task(beir_folder, "train")

    def build(rows, changed=None, **more):
        queries = QuerySet("train", task.queries.select(rows), task.corpus, changed=changed)
        return build_examples(model, stub_teacher, queries, data_arguments(tmp_path), **more)

    seen = [[{"role": "system", "content": "Be brief."}, *task.queries[row]["messages"]] for row in (2, 0)]
    plain = build(range(4))
    changed = build([2, 0], seen, unchanged=plain)
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


def test_the_head_is_to_read_the_end_of_each_prompt(examples):
    dataset = examples(mode="generated")
    batch = collate([dataset[i] for i in range(len(dataset))])
    width = batch["readout_mask"].shape[1]
    wanted = torch.tensor([[place >= width - count for place in range(width)] for count in dataset.num_read])
    assert torch.equal(batch["readout_mask"], wanted)


def test_texts_with_typos_have_the_targets_of_the_right_spelling(tiny_model, stub_teacher):
    texts = [f"the bridge over river number {i}" for i in range(10)]
    dataset = build_texts(tiny_model.processor, stub_teacher, texts, "texts", typo_share=0.5)
    assert len(dataset) == len(dataset.targets) == len(dataset.sequences) == 15
    for sequence, target in zip(dataset.sequences[10:], dataset.targets[10:], strict=True):
        right = [i for i in range(10) if np.array_equal(dataset.targets[i], target)]
        assert right and dataset.sequences[right[0]] != sequence


def test_lexical_pre_training_needs_no_backbone(tiny_model, stub_teacher, tmp_path, monkeypatch):
    texts = [f"the {a} bridge over the {b} river" for a in ("old", "new", "red") for b in ("wide", "cold", "long")]
    dataset = build_texts(tiny_model.processor, stub_teacher, texts, "texts")
    model = copy.deepcopy(tiny_model)
    monkeypatch.setattr(model.backbone, "forward", lambda *a, **k: pytest.fail("the backbone ran"))
    args = arguments(
        *(tmp_path,),
        num_train_epochs=10,
        code_learning_rate=1e-2,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        alignment_weight=1.0,
        contrastive_weight=0.0,
        rank_weight=0.0,
    )
    trainer = NativeRetrievalTrainer(model, args, dataset)
    trainer.train()
    losses = [entry["alignment_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    # A text's vector is that of a prompt which says nothing else, and padding is nothing.
    batch = collate([dataset[i] for i in range(3)])
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(model.eval(), batch, return_outputs=True)
        monkeypatch.undo()
        assert torch.allclose(outputs.query_embeddings, model.embed_query(texts[:3]), atol=1e-5)
    assert loss.item() == pytest.approx(alignment_loss(outputs.query_embeddings, batch["targets"]).item())


@pytest.mark.parametrize("rate", [None, 1e-3])
def test_word_codes_have_a_learning_rate_of_their_own(tiny_model, examples, tmp_path, rate):
    args = NativeRetrievalTrainingArguments(
        **{"output_dir": str(tmp_path), "learning_rate": 1e-2, "use_cpu": True, "weight_decay": 0.5},
        **{"eval_strategy": "no", "load_best_model_at_end": False, "code_learning_rate": rate},
    )
    optimizer = NativeRetrievalTrainer(copy.deepcopy(tiny_model), args, examples()).create_optimizer()
    rates = {p.shape: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[tiny_model.query_head.encoder.codes.weight.shape] == (rate or 1e-2)
    assert rates[tiny_model.query_head.projection.linear_in.weight.shape] == 1e-2
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(trained) == len({id(p) for p in trained}) == sum(p.requires_grad for p in tiny_model.parameters())


# -- from the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def stub_training(monkeypatch, stub_teacher):
    monkeypatch.setattr("train.Teacher", lambda *args, **kwargs: stub_teacher)


def words(backbone_dir, beir_folder, tmp_path, *more):
    places = {"output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    fields = {
        **{"backbone": backbone_dir, "teacher": "stub-teacher", "train_data": beir_folder, "dev_data": beir_folder},
        **{"num_train_epochs": 1, "max_prompt_tokens": 100, "encoder_dim": 32, "encoder_code_dim": 16},
        **{"rank_top_k": 8, "use_cpu": "true", "disable_tqdm": "true", "max_query_tokens": 8, **places},
    }
    return [*(word for name, value in fields.items() for word in (f"--{name}", str(value))), *more]


QUICK = ("--lexical_epochs", "0", "--max_steps", "1")
NO_DEV = ("--eval_strategy", "no", "--load_best_model_at_end", "false")


def test_train_leaves_a_model_that_loads_and_a_card(stub_training, backbone_dir, beir_folder, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("A plain sentence about rivers.\nAnother one, about old bridges.\n" * 3)
    train.main(
        words(backbone_dir, beir_folder, tmp_path, "--plain_text", str(texts), "--query_modes", "context", "generated")
    )
    out = tmp_path / "out"
    model = AutoModel.from_pretrained(out, trust_remote_code=True)
    assert model.embed_query("where is the bridge?").shape == (1, 32)
    assert model.config.teacher_fingerprint
    # The Trainer switches the cache off; pushed like that, the model would generate without one.
    assert model.backbone.config.use_cache and "use_cache" not in json.loads((out / "config.json").read_text())
    card = (out / "README.md").read_text()
    assert "2603.08429" in card and "recall@10" in card.lower() and str(tmp_path) not in card
    info = json.loads((out / "training.json").read_text())
    assert info["dev"] and info["training_seconds"] > 0
    assert not list(out.glob("checkpoint-*"))
    # Where the backbone is on this machine is in a file that is never pushed.
    assert json.loads((out / "_local.json").read_text())["backbone"] == str(backbone_dir)
    published = [path for path in out.rglob("*.json") if path.name not in ("_local.json", "training.json")]
    assert not [path.name for path in published if str(backbone_dir.parent) in path.read_text()]


def test_a_finished_model_is_replaced_only_on_request(stub_training, backbone_dir, beir_folder, tmp_path, capsys):
    train.main(words(backbone_dir, beir_folder, tmp_path, *QUICK))
    out = tmp_path / "out"
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a model; .*--overwrite_output_dir") as error:
        train.main(words(backbone_dir, beir_folder, tmp_path, *QUICK, "--seed", "1"))
    assert_one_line(error)
    train.main(words(backbone_dir, beir_folder, tmp_path, *QUICK, "--seed", "1", "--resume"))
    assert "nothing to resume" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == before
    train.main(words(backbone_dir, beir_folder, tmp_path, *QUICK, "--seed", "1", "--overwrite_output_dir"))
    assert (out / "model.safetensors").read_bytes() != before
    assert AutoModel.from_pretrained(out, trust_remote_code=True).embed_query("where?").shape == (1, 32)


def test_a_push_sends_what_was_saved_once(stub_training, backbone_dir, beir_folder, tmp_path, monkeypatch, capsys):
    saved, pushed = [], []
    save = NativeRetrievalTrainer.save_model
    monkeypatch.setattr("train.check_push", lambda *args: None)
    monkeypatch.setattr(NativeRetrievalTrainer, "init_hf_repo", lambda self: None)
    monkeypatch.setattr(NativeRetrievalTrainer, "save_model", lambda *a, **k: saved.append(k) or save(*a, **k))

    def push(folder, repository, **settings):
        pushed.append((folder, repository, settings["private"]))
        assert (tmp_path / "out" / "README.md").exists() and not list(tmp_path.glob("out/checkpoint-*"))
        if repository == "me/broken":
            raise ConnectionError("down\nagain")
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr("native_retrieval.checkpoints.push_model", push)
    more = (*QUICK, *NO_DEV, "--save_strategy", "no", "--push_to_hub", "--hub_private_repo", "true", "--hub_model_id")
    train.main(words(backbone_dir, beir_folder, tmp_path, *more, "me/tiny"))
    assert pushed == [(str(tmp_path / "out"), "me/tiny", True)] and len(saved) == 1
    assert "Pushed: https://hub/commit" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the model is in .* but could not be pushed: down.*native_retrieval.card"):
        train.main(words(backbone_dir, beir_folder, tmp_path, *more, "me/broken", "--overwrite_output_dir"))


def test_a_named_checkpoint_is_gone_on_from(stub_training, backbone_dir, beir_folder, tmp_path, monkeypatch):
    """As `--resume` does with the last: the end is that of an undisturbed run."""

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    more = ("--num_train_epochs", "3", "--lexical_epochs", "0", "--save_total_limit", "9")
    train.main(words(backbone_dir, beir_folder, tmp_path / "whole", *more))
    wanted = head(AutoModel.from_pretrained(tmp_path / "whole" / "out", trust_remote_code=True))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("native_retrieval.trainer.NativeRetrievalTrainer.log_metrics", stopped)
        train.main(words(backbone_dir, beir_folder, tmp_path, *more))
    first, *_ = sorted((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    with pytest.raises(ValueError, match="is of a training that was stopped"):
        train.main(words(backbone_dir, beir_folder, tmp_path, *more))
    train.main(words(backbone_dir, beir_folder, tmp_path, *more, "--resume_from_checkpoint", str(first)))
    seen = head(AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True))
    assert max((seen[name] - weight).abs().max().item() for name, weight in wanted.items()) < 1e-5


def test_what_cannot_end_well_does_not_begin(stub_training, backbone_dir, beir_folder, tmp_path, monkeypatch):
    """One line before the backbone has run, and before the teacher has encoded a text."""
    monkeypatch.setattr("train.from_backbone", lambda *a, **k: pytest.fail("the model was made"))
    monkeypatch.setattr("train.Teacher", lambda *a, **k: pytest.fail("the teacher was loaded"))
    for more, said in (
        (("--dataloader_drop_last", "--per_device_train_batch_size", "1000"), "dataloader_drop_last leaves nothing"),
        (("--dataloader_drop_last", "--lexical_batch_size", "5000"), "--lexical_batch_size"),
        (("--push_to_hub",), "nothing can be pushed to 'out'"),
        (("--push_to_hub", "--hub_model_id", "a/b/c"), "nothing can be pushed to 'a/b/c'"),
        (("--push_to_hub", "--store_backbone", "false"), "store_backbone=False would push a head"),
        (("--metric_for_best_model", "accuracy"), "metric_for_best_model=accuracy is not measured"),
        (("--resume_from_checkpoint", str(tmp_path / "no")), "is no whole checkpoint"),
        (("--hidden_state_layers", "99"), "hidden_state_layers"),
    ):
        more = ("--per_device_train_batch_size", "4", *more)
        with pytest.raises(ValueError, match=said) as error:
            train.main(words(backbone_dir, beir_folder, tmp_path, *more))
        assert_one_line(error)


def test_an_epoch_has_as_many_examples_as_it_says(stub_training, backbone_dir, beir_folder, tmp_path, capfd):
    train.main(words(backbone_dir, beir_folder, tmp_path, *QUICK, "--train_weights", "2", "--topic_shift_share", "1"))
    count = int(re.search(r"Training on (\d+) examples", capfd.readouterr().out)[1])
    passes = 2 * (12 + round(0.2 * 12) + 12)
    assert count == pytest.approx(passes * 1.25, abs=2)


def test_a_seed_draws_the_head_as_well_as_the_order(stub_training, backbone_dir, beir_folder, tmp_path):
    drawn = []
    for run, seed in enumerate(("1", "1", "2")):
        more = ("--learning_rate", "0", *QUICK, *NO_DEV, "--seed", seed)
        train.main(words(backbone_dir, beir_folder, tmp_path / str(run), *more))
        drawn.append(head(AutoModel.from_pretrained(tmp_path / str(run) / "out", trust_remote_code=True)))
    assert all(torch.equal(weight, drawn[1][name]) for name, weight in drawn[0].items())
    assert any("encoder" in name and not torch.equal(weight, drawn[2][name]) for name, weight in drawn[0].items())
