"""Names of models and data: which are Hub ids, and what of a name or of a command may be published."""

import re
import shlex
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# A blank inside quotes, or after a backslash, ends no word (unless a flag follows it: `C:\folder\ --flag`).
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\\ (?!-)|\S)+""")
_QUOTED = re.compile(r"""'([^']*)'|"([^"]*)"|\\( )""")
_ASSIGNMENT = re.compile(r"(--?[A-Za-z][\w-]*=|[A-Z_][A-Z0-9_]*=)(.*)", re.DOTALL)
_URL = re.compile(r"(https?|hf)://")
_REPOSITORY_FILE = re.compile(r"(?:(?:benchmarks|configs|examples|runs|tests)/)+[\w-]+\.(?:py|sh|ya?ml)")
_LOCAL_FLAG = re.compile(r"--(?:\w+_(?:dir|file|path)|output|figures|report|index|results)")
_TEXT_FLAG = re.compile(r"--(?:query_prompt|license|data_license)")
_OUTSIDE = re.compile(r"[/\\~$%]|[A-Za-z]:[/\\]|file:|(.*[/\\])?\.\.([/\\]|$)")
_HOME = re.compile(r"~[^/\\]*|/home/[^/]+|(?:[A-Za-z]:)?[/\\]Users[/\\][^/\\]+")


def is_hub_id(name: str) -> bool:
    """Whether a name has the shape `owner/name` of a Hub id, and there is no such path here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()


def check_model_name(name: str) -> None:
    """Raises `ValueError` unless a name is a folder or a Hub id: of a mistyped path, the Hub might have a stranger's model."""
    if not Path(name).is_dir() and (not is_hub_id(name) or _is_inside_a_folder(name)):
        raise ValueError(
            f"model {name} is no folder, and no Hub id (owner/name) either; name a folder that train.py wrote"
        )


def _is_inside_a_folder(name: str) -> bool:
    """Whether a name begins with a folder that is here: the rest of it may be mistyped, or gone by now."""
    return Path(name.split("/")[0]).is_dir()


def published_name(name: str) -> str:
    """A Hub id as it is; of a local path, of this system or another, the last part alone."""
    return name if is_hub_id(name) else base_name(name)


def base_name(path: str) -> str:
    """The last part of a POSIX or Windows path; `PATH` if that would name a user or nothing."""
    path = path.rstrip("/\\")
    last = re.split(r"[/\\]", path)[-1]
    return last if re.fullmatch(r"[\w.,:+@= -]+", last) and last.strip(". ") and not _HOME.fullmatch(path) else "PATH"


def published_command(command: str, keep_relative: bool = False) -> str:
    """
    A command line without the folders of its author's disk: every local path becomes its last part.

    Hub ids, `NAME:SPLIT`, URLs, and the scripts and recipes of this repository stay as they are. `keep_relative` also keeps
    paths inside the working directory, for pages of a repository in which they exist.
    """
    words, flag = [], ""
    for match in _WORD.finditer(command):
        word = _QUOTED.sub(lambda quoted: "".join(part or "" for part in quoted.groups()), match[0])
        assignment = _ASSIGNMENT.fullmatch(word)
        prefix, value = assignment.groups() if assignment else ("", word)
        if word.startswith("-"):
            flag = (prefix.rstrip("=") or word).replace("-", "_").replace("__", "--", 1)
        kept = value if keep_relative and not _OUTSIDE.match(value) else _published_value(value, flag)
        words.append(match[0] if kept == value else prefix + shlex.quote(kept))
    return " ".join(words)


def _published_value(value: str, flag: str) -> str:
    is_path = "/" in value or "\\" in value or value.startswith("~")
    if not is_path or _URL.match(value) or _REPOSITORY_FILE.fullmatch(value) or _TEXT_FLAG.fullmatch(flag):
        return value
    source = re.sub(r":[^:/\\]+$", "", value)
    if is_hub_id(source) and not _is_inside_a_folder(source) and not _LOCAL_FLAG.fullmatch(flag):
        return value
    return base_name(value)
