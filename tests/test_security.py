"""What a stranger's machine runs when it loads our repository: files that reach for nothing."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

SHIPPED = sorted(path.name for path in REPOSITORY.glob("*_native_retrieval.py"))
ALLOWED = {"torch", "transformers", *(name.removesuffix(".py") for name in SHIPPED), *sys.stdlib_module_names}
# Of the standard library, what could reach the disk, the network, the environment or another program.
REACHING = {
    "subprocess",
    "socket",
    "urllib",
    "http",
    "ftplib",
    "shutil",
    "tempfile",
    "pickle",
    "marshal",
    "ctypes",
    "importlib",
}
BUILTINS = {"open", "exec", "eval", "compile", "__import__", "breakpoint", "input"}
METHODS = {"system", "popen", "getenv", "write_text", "read_text", "unlink", "rmtree", "connect", "urlopen"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(module: ast.Module) -> set[str]:
    names = {
        alias.name.split(".")[0] for node in ast.walk(module) if isinstance(node, ast.Import) for alias in node.names
    }
    froms = (node for node in ast.walk(module) if isinstance(node, ast.ImportFrom) and not node.level)
    return names | {node.module.split(".")[0] for node in froms}


def called(module: ast.Module) -> tuple[set[str], set[str]]:
    """Names that are called, and names of methods."""
    functions = [node.func for node in ast.walk(module) if isinstance(node, ast.Call)]
    names = {function.id for function in functions if isinstance(function, ast.Name)}
    return names, {function.attr for function in functions if isinstance(function, ast.Attribute)}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_import_and_call_nothing_that_reaches_out(name):
    module = tree(REPOSITORY / name)
    assert imported(module) <= ALLOWED
    assert not imported(module) & REACHING
    for node in ast.walk(module):  # saving may replace files; loading and embedding may not
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if getattr(part, "name", "") != "save_pretrained"]
    names, methods = called(module)
    assert not names & BUILTINS and not methods & METHODS
    attributes = {node.attr for node in ast.walk(module) if isinstance(node, ast.Attribute)}
    assert "environ" not in attributes
    # Nothing runs at import but definitions, and the two lines that tell transformers of the classes.
    loose = [node for node in module.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert {node.value.func.attr for node in loose} <= {"register_for_auto_class"}


def test_nothing_of_the_project_unpickles():
    for path in [*REPOSITORY.glob("*.py"), *(REPOSITORY / "native_retrieval").rglob("*.py")]:
        module = tree(path)
        assert not imported(module) & {"pickle", "dill", "joblib", "cloudpickle"}, path
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                arguments = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                assert not arguments.get("allow_pickle"), path
                if node.func.attr == "load" and getattr(node.func.value, "id", "") == "torch":
                    assert arguments.get("weights_only") is True, path


AUDIT = """
import json, sys
seen = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & 3:
        seen.append(["write", str(arguments[0])])
    elif event in ("socket.connect", "subprocess.Popen", "os.system"):
        seen.append([event, str(arguments)[:200]])
from transformers import AutoModel  # what the libraries do at import is theirs
import torch
sys.addaudithook(hook)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
model.embed_query([{"role": "user", "content": "Who?"}], return_cache=True)
print(json.dumps(seen))
"""


def test_loading_and_embedding_write_nothing_and_connect_nowhere(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", AUDIT, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    events = json.loads(done.stdout.splitlines()[-1])
    # transformers copies these files into its own cache, as for any such repository.
    ours = [event for event in events if "transformers_modules" not in event[1] and "__pycache__" not in event[1]]
    assert not ours, ours


@pytest.mark.parametrize(
    "messages",
    [
        ["my secret"],
        [{"content": "my secret"}],
        [{"role": "user", "content": b"my secret"}],
        [{"role": "nobody", "content": "my secret"}],
        [{"role": "user", "content": "my secret " * 500}],
        [{"role": "assistant", "content": "my secret"}, {"role": "user", "content": " "}],
    ],
)
def test_errors_do_not_quote_what_was_said(tiny_model, messages):
    with pytest.raises(ValueError) as error:
        tiny_model.embed_query([messages], truncation=False)
    assert "secret" not in str(error.value)
