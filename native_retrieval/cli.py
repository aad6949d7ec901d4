"""What the command lines share: one parser of YAML and flags, help that teaches, and errors in one line."""

import copy
import difflib
import functools
import os
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

METAVARS = {int: "N", float: "X", string_to_bool: "true|false"}


def nearest(word: str, known: Collection[str]) -> str:
    """`, did you mean ...?`, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else ""


def one_line_errors(name: str) -> Callable[[Callable[..., object]], Callable[..., int]]:
    """
    Makes a function a command, which returns its exit code: 0, or 2 for bad input, after `name` and one line on stderr.

    With `--debug_errors` on the command line, the error itself.
    """

    def decorate(function: Callable[..., object]) -> Callable[..., int]:
        @functools.wraps(function)
        def command(*arguments) -> int:
            try:
                function(*arguments)
            except (ValueError, OSError, FloatingPointError) as error:
                if "--debug_errors" in sys.argv:
                    raise
                print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
                return 2
            return 0

        return command

    return decorate


def check_writable(flag: str, directory: Path) -> None:
    """Raises `ValueError`, naming the flag, if nothing can be written to a directory, which need not exist yet."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--{flag}: {existing} is a file, wanted a directory; name another place")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"--{flag}: {existing} cannot be written to; name another place")


class HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """The description as it stands, each flag in one spelling, and the defaults that say something."""

    def __init__(self, prog: str, **kwargs):
        super().__init__(prog, max_help_position=38, **kwargs)

    def _get_help_string(self, action: Action) -> str | None:
        silent = action.default in (None, "", False) or isinstance(action.default, list)
        return action.help if silent else super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        shown.metavar = action.metavar or METAVARS.get(action.type, "TEXT")
        return super()._format_action_invocation(shown)


class CommandParser(ArgumentParser):
    """argparse's parser with the description as it stands; an error is one line on stderr and exit code 2."""

    def __init__(self, prog: str, description: str | None):
        super().__init__(
            prog=prog, description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:  # argparse would print the usage first
        self.exit(2, f"{self.prog.rpartition('native_retrieval.')[2]}: {message}; --help lists all\n")


class Parser(HfArgumentParser):
    """
    transformers' parser of dataclasses, with its flags in groups, a YAML file before them, and errors as `ValueError`.

    Args:
        groups (`dict[str, Collection[str]]`): the fields to show under each title; others work, and are not listed.
    """

    def __init__(self, dataclasses, groups: Mapping[str, Collection[str]], **kwargs):
        super().__init__(dataclasses, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        # Help prints the actions of groups; what is in none, such as each flag's --no_ form, still works.
        actions = {action.dest: action for action in self._actions if not action.option_strings[0].startswith("--no_")}
        self._optionals._group_actions = [action for action in self._optionals._group_actions if action.dest == "help"]
        for title, names in groups.items():
            self.add_argument_group(title)._group_actions.extend(actions[name] for name in names)

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """
        `[recipe.yaml] [--field value ...]` to one instance of each dataclass; the command line wins.

        Raises:
            `ValueError`: in one line, for a file that cannot be read, an unknown field, or a value that does not fit.
        """
        known = {"help", *(field.name for group in self.dataclass_types for field in fields(group) if field.init)}
        words, argv = [], list(argv)
        if argv and not argv[0].startswith("-"):
            path = Path(argv.pop(0))
            recipe = _read_recipe(path)
            for name in recipe:
                self._check_name(str(name), known, f"recipe {path}")
            words = _as_words(recipe)
        # Before parsing: argparse would complain about the required flag that a mistyped one leaves unset.
        for word in argv:
            if word.startswith("--"):
                name = word[2:].partition("=")[0].replace("-", "_")
                self._check_name(name.removeprefix("no_"), known, "command line")
        try:
            *parsed, unused = self.parse_args_into_dataclasses(
                words + argv, return_remaining_strings=True, look_for_args_file=False
            )
        except OSError as error:  # transformers takes a field that is no mapping for the name of a JSON file
            raise ValueError(
                f"{error.filename!r}, which a field names, cannot be read ({error.strerror}); give an existing JSON "
                "file, or the mapping itself"
            ) from error
        if unused:
            raise ValueError(f"{unused[0]!r} belongs to no field; see `python {self.prog} --help`")
        return tuple(parsed)

    def _check_name(self, name: str, known: Collection[str], where: str) -> None:
        if name not in known:
            hint = nearest(name, known) or f"; see `python {self.prog} --help`"
            raise ValueError(f"{where}: unknown field {name!r}{hint}")

    def error(self, message: str) -> NoReturn:  # argparse would print the whole usage first
        raise ValueError(message)


def _read_recipe(path: Path) -> dict[Any, Any]:
    import yaml

    if not path.is_file():
        raise ValueError(f"recipe {path} does not exist; give a YAML file, such as configs/demo.yaml")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception as error:  # for a bad date or number, YAML's reader raises whatever Python does
        raise ValueError(f"recipe {path} is not YAML in UTF-8: {' '.join(str(error).split())}") from error
    if recipe is not None and not isinstance(recipe, dict):
        raise ValueError(f"recipe {path} holds a {type(recipe).__name__}; write `field: value` lines")
    return recipe or {}


def _as_words(recipe: Mapping[Any, Any]) -> list[str]:
    """YAML fields as words of a command line: both then pass the same checks and conversions."""
    words = []
    for name, value in recipe.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, (dict, list)) or (isinstance(value, list) and str(item).startswith("--")):
                raise ValueError(f"recipe field {name} holds {item!r:.60}; give a value, or a list of values")
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")  # as one word: a text may begin with a dash
    return words
