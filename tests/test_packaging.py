"""What the wheel holds: everything that the installed package reads, and the files that go with a saved model."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

tomllib = pytest.importorskip("tomllib")  # of Python 3.11

SETTINGS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
FLAT = [path.name for path in REPOSITORY.glob("*_native_retrieval.py")]  # the files that go with a saved model


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel would put into site-packages, and nothing else of the repository."""
    folder = tmp_path_factory.mktemp("installed")
    if importlib.util.find_spec("hatchling"):
        program = "import hatchling.build, sys; print(hatchling.build.build_wheel(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", program, str(folder)], cwd=REPOSITORY, check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()
        return folder
    for name in SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, folder / name)
    return folder


def test_the_wheel_holds_the_shipped_files_the_cards_template_and_the_mark_of_types(installed: Path):
    for name in [*FLAT, "model_card.md", "native_retrieval/py.typed", "native_retrieval/demo-assets.txt"]:
        assert (installed / name).is_file(), name
    assert "modeling_native_retrieval.py" in FLAT
    assert not (installed / "train.py").exists() and not (installed / "tests").exists()


def test_the_installed_package_finds_its_own_files(installed: Path, tmp_path: Path):
    """Run from elsewhere, with nothing of the repository on the path."""
    program = "from native_retrieval import agent, assets, build_index, card, synthesis"
    program += "; assert card.TEMPLATE.is_file() and assets.read_requirements(); print(card.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed)


def test_versions_and_names_agree():
    project = SETTINGS["project"]
    assert f"version: {project['version']}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert "transformers>=5.20.2" in project["dependencies"], "the first that can neutralise control tokens"
    known = SETTINGS["tool"]["ruff"]["lint"]["isort"]["known-first-party"]
    assert set(known) == {"native_retrieval", *(name.removesuffix(".py") for name in FLAT)}
    pinned = (REPOSITORY / "constraints.txt").read_text()
    assert "\ntorch==" in pinned and "\ntransformers==" in pinned
