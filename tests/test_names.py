"""Names and commands as they may be published: nothing in them tells of their author's disk."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from native_retrieval.names import check_model_name, is_hub_id, published_command, published_name

LOCAL = {
    "/home/alice/m": "m",
    "/home/al ice/m": "m",
    "/data/alice/m/": "m",
    "../x/m": "m",
    "../alice/x/m": "m",
    "./m": "m",
    ".cache/alice/m": "m",
    "alice/x/m": "m",
    "al ice/m": "m",
    "~/m": "m",
    "~alice/m": "m",
    "$HOME/alice/m": "m",
    "C:\\alice\\m": "m",
    "C:\\al ice\\m": "m",
    "C:\\alice y\\m\\": "m",
    "C:/al ice/m": "m",
    "\\\\alice\\share\\m": "m",
    "..\\alice\\m": "m",
    "%USERPROFILE%\\alice\\m": "m",
    "file:///alice/m": "m",
    "/data/alice=1/m": "m",
    "/home/alice": "PATH",
    "~alice": "PATH",
    "/Users/alice/": "PATH",
    "C:\\Users\\alice": "PATH",
    '{"a": "/home/alice/x"}': "PATH",
    "/home/alice/logs:dev": "logs:dev",
    "C:\\alice\\logs:dev": "logs:dev",
    "../alice/logs:dev": "logs:dev",
}
READABLE = [
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "someone/logs:dev",
    "logs:dev",
    "logs",
    "configs/best.yaml",
    "benchmarks/configs/ablation.yaml",
    "benchmarks/latency.py",
    "1e-3",
    "https://huggingface.co/a/b",
    "native-context",
]


def spellings(value: str) -> list[str]:
    """One value of a flag, as shells and Python write it."""
    ways = [f"--model {shlex.quote(value)}", f"--model={shlex.quote(value)}", shlex.quote(f"--model={value}")]
    if '"' not in value:
        ways += [f'--model "{value}"', f'--model="{value}"']
    if " " not in value and '"' not in value:
        ways += [f"--model {value}", f"--model={value}"]
    if "\\" not in value and '"' not in value:
        ways.append(f"--model {value}".replace(" ", "\\ ").replace("\\ ", " ", 1))
    return ways


@pytest.mark.parametrize(("path", "name"), LOCAL.items())
def test_a_local_path_in_a_command_becomes_its_last_part(path, name):
    for given_command in spellings(path):
        command = published_command(f"python eval.py {given_command} --split test")
        assert command in (f"python eval.py --model {name} --split test", f"python eval.py --model={name} --split test")


@pytest.mark.parametrize("word", READABLE)
def test_what_is_no_local_path_stays_readable(word):
    for command in (f"train.py {word} --seed 3", f"train.py --train_data {word} logs", f"train.py --x={word}"):
        assert published_command(command) == command


def test_several_values_of_a_flag_and_the_script_itself():
    command = "/usr/alice/bin/python /src/alice/train.py a.yaml --train_data /x/alice/logs:dev ../alice/y --seed 3"
    assert published_command(command) == "python train.py a.yaml --train_data logs:dev y --seed 3"
    assert published_command("HF_HOME=/x/alice/hf python eval.py") == "HF_HOME=hf python eval.py"


@pytest.mark.parametrize("flag", ["--output_dir", "--output-dir", "--cache_dir", "--output", "--index", "--figures"])
def test_the_value_of_a_flag_for_folders_is_never_taken_for_a_hub_id(flag):
    assert published_command(f"eval.py {flag} alice/m") == f"eval.py {flag} m"
    assert published_command(f"eval.py {flag}=alice/m --model me/mine") == f"eval.py {flag}=m --model me/mine"


def test_what_begins_with_a_folder_here_is_meant_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_model_name("outputs/mine")
    assert published_command("x --model outputs/mine") == "x --model outputs/mine"
    (tmp_path / "outputs").mkdir()
    assert is_hub_id("outputs/mine") and published_name("outputs/mine") == "outputs/mine"
    with pytest.raises(ValueError, match="no folder"):
        check_model_name("outputs/mine")
    assert published_command("x --model outputs/mine --data outputs/d:dev") == "x --model mine --data d:dev"
    (tmp_path / "outputs" / "mine").mkdir()
    check_model_name("outputs/mine")
    assert not is_hub_id("outputs/mine") and published_name("outputs/mine") == "mine"


@pytest.mark.parametrize(
    "name", ["mine", "./mine", "../mine", "a/b/c", "~/mine", "C:\\my models\\m", "file", "/mine", "a b/c", "mine/"]
)
def test_a_mistyped_path_is_never_asked_of_the_hub(name, monkeypatch, tmp_path):
    from native_retrieval import loading

    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(loading, "snapshot_download", lambda *_, **__: pytest.fail("the Hub is asked"))
    for load in (loading.load_model, loading.load_head, loading.model_folder):
        with pytest.raises(ValueError, match="no folder, and no Hub id"):
            load(name)


def test_prose_and_empty_words_are_left_alone():
    for command in ("x --query_prompt 'Write and/or search' --a ''", "x --data_license 'CC BY/SA 4.0'", ""):
        assert published_command(command) == command


@pytest.mark.parametrize(
    "name", ["mine", "gpt2", ".", "..", "", "/a/b", "./b", "../b", "a/b/c", "a\\b", "~/b", "a/", "a b/c"]
)
def test_only_owner_and_name_make_a_hub_id(name):
    assert not is_hub_id(name)


def test_published_names():
    assert published_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert published_name("gpt2") == "gpt2"
    for path, name in LOCAL.items():
        assert published_name(path) == name


parts = st.text("ab -_.=~", min_size=1, max_size=6).map(lambda part: f"alice{part}")


@given(st.lists(parts, min_size=1, max_size=4), st.sampled_from(["/", "~/", "../", "./", "C:\\", "\\\\"]))
def test_no_folder_of_any_path_is_published(folders, root):
    separator = "\\" if "\\" in root else "/"
    path = root + separator.join([*folders, "m"])
    for command in (shlex.join(["train.py", "--x", path]), shlex.join(["train.py", f"--x={path}", "b"])):
        assert "alice" not in published_command(command)


def test_pages_of_a_repository_keep_paths_inside_it():
    command = (
        "python eval.py --model outputs/a/b --data .cache/d --index ../alice/i --teacher /x/alice/t --x a/../../alice/y"
    )
    expected = "python eval.py --model outputs/a/b --data .cache/d --index i --teacher t --x y"
    assert published_command(command, keep_relative=True) == expected
    for path, name in LOCAL.items():
        if path not in (".cache/alice/m", "alice/x/m", "al ice/m", "./m", '{"a": "/home/alice/x"}'):
            assert published_command(shlex.join(["x", path]), keep_relative=True) == f"x {name}"
