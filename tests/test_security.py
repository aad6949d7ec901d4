"""What a stranger's machine runs when it loads our repository: files that reach for nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from conftest import REPOSITORY

SHIPPED = sorted(path.name for path in REPOSITORY.glob("*_native_retrieval.py"))
# All that a stranger's machine imports for our model, beside the shipped files themselves.
LIBRARIES = {
    "torch",
    "torch.nn.functional",
    "transformers",
    "transformers.utils",
    "transformers.convert_slow_tokenizer",
}
STANDARD = {
    "bisect",
    "collections.abc",
    "contextlib",
    "copy",
    "dataclasses",
    "itertools",
    "json",
    "os",
    "pathlib",
    "re",
}
STANDARD |= {"threading", "typing", "unicodedata"}
# Of these, only what neither writes nor reaches out; `os` is there for the names of files.
MEMBERS = {"os": {"path"}, "json": {"dumps", "loads"}}
BUILTINS = {"open", "exec", "eval", "compile", "__import__", "breakpoint", "input", "globals", "vars"}
METHODS = {"system", "popen", "getenv", "write_text", "write_bytes", "read_text", "mkdir", "rename", "rmdir", "rmtree"}
METHODS |= {"unlink", "connect", "urlopen", "load_library", "hub"}
# Private names of the libraries that are theirs to be overridden, as their documentation says.
OVERRIDDEN = {"_auto_class", "_init_weights"}
# Methods of Python's own classes, private in name only.
PYTHONS = {"_replace"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(module: ast.Module) -> set[str]:
    """Names of modules, as they are written."""
    names = {alias.name for node in ast.walk(module) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(module) if isinstance(node, ast.ImportFrom) and not node.level}


def private(names: Iterator[str]) -> set[str]:
    return {name for name in names if name.startswith("_") and not name.endswith("__") and name != "_"}


def defined(module: ast.Module) -> set[str]:
    """Names of functions, classes, variables and attributes that a file gives a value to."""
    names = {node.name for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored = (node for node in ast.walk(module) if isinstance(getattr(node, "ctx", None), ast.Store))
    return names | {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in stored}


def test_the_shipped_files_are_all_there():
    """The scanner of transformers follows imports of one dot, of files beside each other."""
    assert {name.split("_")[0] for name in SHIPPED} >= {"configuration", "head", "modeling", "processing"}
    beside = {name.removesuffix(".py") for name in SHIPPED}
    for name in SHIPPED:
        relative = [
            node for node in ast.walk(tree(REPOSITORY / name)) if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert {node.module for node in relative} <= beside and {node.level for node in relative} <= {1}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_import_and_call_nothing_that_reaches_out(name):
    module = tree(REPOSITORY / name)
    assert imported(module) <= LIBRARIES | STANDARD | {file.removesuffix(".py") for file in SHIPPED}
    for node in ast.walk(module):  # saving may replace files; loading and embedding may not
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if getattr(part, "name", "") != "save_pretrained"]
    functions = [node.func for node in ast.walk(module) if isinstance(node, ast.Call)]
    assert not {function.id for function in functions if isinstance(function, ast.Name)} & BUILTINS
    attributes = [node for node in ast.walk(module) if isinstance(node, ast.Attribute)]
    assert not {node.attr for node in attributes} & METHODS
    for owner, members in MEMBERS.items():
        used = {node.attr for node in attributes if getattr(node.value, "id", None) == owner}
        assert used <= members, (owner, used)
    loads = [node for node in attributes if node.attr == "load" and getattr(node.value, "id", None) == "torch"]
    assert not loads
    # Nothing runs at import but definitions, and the lines that tell transformers of the classes.
    loose = [node for node in module.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert {node.value.func.attr for node in loose} <= {"register_for_auto_class"}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_use_no_private_names_of_others(name):
    """Such names change without notice, and a model on the Hub with them."""
    module = tree(REPOSITORY / name)
    ours = set().union(*(defined(tree(REPOSITORY / file)) for file in SHIPPED))
    used = (node.attr if isinstance(node, ast.Attribute) else node.id for node in ast.walk(module)
            if isinstance(node, ast.Attribute | ast.Name))  # fmt: skip
    assert private(used) <= ours | PYTHONS
    parts = (part for dotted in imported(module) for part in dotted.split("."))
    names = (alias.name for node in ast.walk(module) if isinstance(node, ast.ImportFrom) for alias in node.names)
    assert not private(parts) and not private(names)
    keywords = (
        keyword.arg or "" for node in ast.walk(module) if isinstance(node, ast.Call) for keyword in node.keywords
    )
    assert not private(keywords)
    texts = {node.args[1].value for node in ast.walk(module) if isinstance(node, ast.Call)
             and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr") and isinstance(node.args[1], ast.Constant)}  # fmt: skip
    assert not private(iter(texts))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_override_no_private_names_by_accident(name):
    theirs = (transformers.PreTrainedModel, transformers.GenerationMixin, transformers.ProcessorMixin, torch.nn.Module)
    taken = set().union(*map(dir, (*theirs, transformers.PreTrainedConfig)))
    module = tree(REPOSITORY / name)
    inside = (part for node in ast.walk(module) if isinstance(node, ast.ClassDef) for part in ast.walk(node))
    assert private(iter(defined(ast.Module(list(inside), [])))) & taken <= OVERRIDDEN


def test_nothing_of_the_project_unpickles():
    for path in [*REPOSITORY.glob("*.py"), *(REPOSITORY / "native_retrieval").rglob("*.py")]:
        module = tree(path)
        assert not {name.split(".")[0] for name in imported(module)} & {"pickle", "dill", "joblib", "cloudpickle"}, path
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
