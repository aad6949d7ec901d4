"""The recipe and the command line of train.py: what is read, and what is refused before anything costly begins."""

import dataclasses
import re

import pytest
from conftest import REPOSITORY, assert_one_line
from fuzz import check_recipe, recipes
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given, settings

import train
from configuration_native_retrieval import NativeRetrievalConfig
from native_retrieval.arguments import ModelArguments, lexical_arguments, parse
from native_retrieval.preflight import check, check_backbone, check_batch, check_push

RECIPES = [*REPOSITORY.glob("configs/*.yaml"), *REPOSITORY.glob("benchmarks/configs/*.yaml")]
NEEDED = ["--backbone", "b", "--teacher", "t", "--train_data", "d", "--dev_data", "d"]


def arguments(tmp_path, *words: str):
    where = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--use_cpu"]
    return parse([*NEEDED, *where, *words])


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--bakbone", "x"], "did you mean backbone"),
        (["--bakbone=x"], "did you mean backbone"),
        (["no-such.yaml"], "does not exist"),
        (["--seed"], "expected one argument"),
        (["--seed", "1", "2"], "'2' belongs to no field"),
        ([], "backbone is missing"),
        (["--backbone", "b"], "teacher is missing"),
        (["--backbone", "b", "--teacher", "t"], "train_data is missing"),
        (["--backbone", "b", "--teacher", "t", "--train_data", "d"], "dev_data is missing"),
        (["--train_data", "d", "--train_weights", "1", "2"], "one number above 0 for each of the 1 entries"),
        (["--train_data", "d", "--train_weights", "1.5"], "above 1 give whole numbers"),
        (["--selection_heads", "21.5", "21-6"], "selection_heads has '21-6', wanted LAYER.HEAD"),
        (["--read_words", "false"], "the head would read nothing"),
        (["--copy_num_heads", "2"], "copy_num_heads"),
        (["--augmentation_share", "-0.1"], "wanted 0 to 1"),
        (["--plain_text_share", "-1"], "wanted 0 or more"),
        (["--lexical_batch_size", "0"], "wanted at least 1"),
        (["--per_device_eval_batch_size", "0"], "wanted at least 1"),
        (["--rank_top_k", "1"], "wanted at least 2"),
        (["--rank_temperature", "0"], "wanted above 0"),
        (["--alignment_weight", "-1"], "must not be negative"),
        (["--hub_strategy", "every_save"], "hub_strategy"),
        (["--batch_eval_metrics"], "batch_eval_metrics cannot be changed"),
        (["--bf16_full_eval"], "bf16_full_eval cannot be changed"),
        (["--eval_do_concat_batches", "false"], "eval_do_concat_batches cannot be changed"),
        ([*NEEDED, "--query_modes", "context", "probe"], r"query_modes \['probe'\] are unknown"),
        ([*NEEDED, "--query_mode", "generated"], "query_mode=generated is the default of the saved model"),
        ([*NEEDED, "--query_modes", "context", "generated", "--generated_data", "e"], r"generated_data \['e'\]"),
        ([*NEEDED, "--dev_data", "a/d", "b/d:test"], "dev_data names d twice"),
        ([*NEEDED, "--metric_for_best_model", "ndgc@10"], "not measured, did you mean ndcg@10"),
        ([*NEEDED, "--metric_for_best_model", "loss"], "not measured"),
        ([*NEEDED, "--metric_for_best_model", "d_generated_mrr@10"], "not measured"),
        ([*NEEDED, "--report_to", "no-such-tracker"], "report_to cannot be no-such-tracker"),
        ([*NEEDED, "--report_to", "wandb"], "report_to cannot be wandb: .*installed"),
    ],
)
def test_bad_arguments_are_one_line(argv, said):
    with pytest.raises(ValueError, match=said) as raised:
        train.main([*argv, "--use_cpu"])
    assert_one_line(raised)


@pytest.mark.parametrize("metric", ["mrr@10", "eval_ndcg@10", "d_context_recall@10", "eval_d_context_loss"])
def test_a_metric_that_dev_gives_may_name_the_best_checkpoint(tmp_path, metric):
    model, data, _, training = arguments(tmp_path, "--metric_for_best_model", metric)
    check(model, data, training)
    assert training.greater_is_better == (not metric.endswith("loss"))


def test_modes_of_which_there_is_no_training_data_are_refused(tmp_path):
    words = ["--query_modes", "generated", "--query_mode", "generated", "--dev_data", "e", "--generated_data", "e"]
    model, data, _, training = arguments(tmp_path, *words)
    with pytest.raises(ValueError, match="generated_data names none of train_data") as raised:
        check(model, data, training)
    assert_one_line(raised)


@pytest.mark.parametrize("flag", ["output_dir", "cache_dir"])
def test_a_place_that_cannot_be_written_to_is_named(tmp_path, flag):
    (tmp_path / "file").write_text("")
    model, data, _, training = arguments(tmp_path, f"--{flag}", str(tmp_path / "file" / "out"))
    with pytest.raises(ValueError, match=f"--{flag}: .*file is a file") as raised:
        check(model, data, training)
    assert_one_line(raised)


def test_a_backbone_and_what_does_not_fit_it_is_named(backbone_dir, tmp_path):
    check_backbone(ModelArguments(backbone=str(backbone_dir), teacher="t", max_prompt_tokens=448))
    with pytest.raises(ValueError, match="backbone .*no-such.* cannot be loaded"):
        check_backbone(ModelArguments(backbone=str(tmp_path / "no-such"), teacher="t"))
    with pytest.raises(ValueError, match="hidden_state_layers"):
        check_backbone(
            ModelArguments(backbone=str(backbone_dir), teacher="t", max_prompt_tokens=None, hidden_state_layers=[99])
        )
    with pytest.raises(ValueError, match="max_prompt_tokens=500 leaves no room .* context of 512; at most 448"):
        check_backbone(ModelArguments(backbone=str(backbone_dir), teacher="t", max_prompt_tokens=500))


@pytest.mark.parametrize("count, batch", [(0, 1), (7, 8), (63, 64), (100, 512)])
def test_a_batch_that_is_never_full_is_refused_if_such_are_left_out(tmp_path, count, batch):
    _, data, _, training = arguments(
        tmp_path, "--dataloader_drop_last", "--per_device_train_batch_size", str(batch), "--lexical_batch_size", "9"
    )
    with pytest.raises(
        ValueError, match=f"{count} examples, and a batch takes {batch}; lower --per_device_train"
    ) as raised:
        check_batch(training, count)
    assert_one_line(raised)
    check_batch(training, batch)
    check_batch(arguments(tmp_path)[-1], count)
    with pytest.raises(ValueError, match="a batch takes 9; lower --lexical_batch_size"):
        check_batch(lexical_arguments(training, data), 8, "lexical_batch_size")


class Hub:
    """Stands for the client: refuses or takes a new repository."""

    error: Exception | None = None
    made: list[str] = []

    def __init__(self, token=None):
        pass

    def create_repo(self, name, **kwargs):
        if self.error:
            raise self.error
        self.made.append(name)
        return type("Url", (), {"repo_id": f"me/{name}" if "/" not in name else name})


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "made", [])
    monkeypatch.setattr(Hub, "error", None)
    monkeypatch.setattr("native_retrieval.preflight.HfApi", Hub)
    return Hub


def test_a_push_that_would_fail_is_refused_before_training(tmp_path, hub, monkeypatch):
    model, _, _, training = arguments(tmp_path, "--push_to_hub", "--hub_model_id", "me/tiny")
    check_push(model, training)
    assert hub.made == ["me/tiny"]
    unnamed = arguments(tmp_path, "--push_to_hub")[-1]
    check_push(model, unnamed)
    assert hub.made[1:] == ["out"], "the name of the folder"
    response = type("Response", (), {"status_code": 401, "headers": {}, "request": None, "text": ""})()
    for error in (HfHubHTTPError("401: log in\nfirst", response=response), ConnectionError("offline")):
        monkeypatch.setattr(Hub, "error", error)
        with pytest.raises(ValueError, match="nothing can be pushed to 'me/tiny' .*hf auth login") as raised:
            check_push(model, training)
        assert_one_line(raised)


@pytest.mark.parametrize("name", ["a/b/c", "me/with blank", "-me/x", "me/x.git", "me/..x"])
def test_a_malformed_repository_is_refused_before_training(tmp_path, name):
    model, _, _, training = arguments(tmp_path, "--push_to_hub", f"--hub_model_id={name}")
    with pytest.raises(ValueError, match=f"nothing can be pushed to '{re.escape(name)}'") as raised:
        check_push(model, training)
    assert_one_line(raised)


@pytest.mark.parametrize("backbone", ["the folder", "gpt2", "no/such/folder"])
def test_a_head_whose_backbone_nobody_else_has_is_not_pushed(backbone_dir, tmp_path, hub, backbone):
    backbone = str(backbone_dir) if backbone == "the folder" else backbone
    model, _, _, training = arguments(tmp_path, "--push_to_hub", "--backbone", backbone, "--store_backbone", "false")
    with pytest.raises(ValueError, match="store_backbone=False would push a head that nobody can load") as raised:
        check_push(model, training)
    assert_one_line(raised)
    assert hub.made == []
    check_push(dataclasses.replace(model, backbone="Qwen/Qwen3-0.6B"), training)
    check_push(dataclasses.replace(model, store_backbone=True), training)


def test_a_misspelt_recipe_field_names_the_nearest(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learnin_rate: 1\n")
    with pytest.raises(ValueError, match="learning_rate"):
        parse([str(recipe)])


@settings(max_examples=40, deadline=None)
@given(recipes)
def test_a_recipe_is_read_or_refused_in_one_line(recipe):
    check_recipe(recipe)


def test_the_command_line_wins_over_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"backbone: a\nlearning_rate: 1.0e-3\nquery_modes: [context, generated]\noutput_dir: {tmp_path}\nresume: true\n"
    )
    model, data, run, training = parse([str(recipe), "--backbone", "b", "--train-data", "d", "--resume", "false"])
    assert (model.backbone, training.learning_rate, run.resume) == ("b", 1e-3, False)
    assert data.query_modes == ["context", "generated"] and data.train_data == ["d"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse(recipe):
    parse([str(recipe), "--use_cpu", "--bf16", "false"])


def test_a_recipe_starts_from_the_configurations_own_defaults():
    ours = {field.name: field.default for field in dataclasses.fields(ModelArguments)}
    theirs = {field.name: field.default for field in dataclasses.fields(NativeRetrievalConfig)}
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 10
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
