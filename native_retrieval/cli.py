"""What the command lines share: help that teaches, and one line that names the nearest flag to a mistyped one."""

import copy
import difflib
import functools
import os
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

METAVARS = {int: "N", float: "X", string_to_bool: "true|false"}


def nearest(word: str, known: Collection[str]) -> str:
    """`, did you mean ...?`, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else ""


def one_line_errors(name: str) -> Callable[[Callable[..., object]], Callable[..., int]]:
    """Makes a function a command, which returns its exit code: 0, or 2 for bad input, after `name` and one line on stderr."""

    def decorate(function: Callable[..., object]) -> Callable[..., int]:
        @functools.wraps(function)
        def command(*arguments) -> int:
            try:
                function(*arguments)
            except (ValueError, OSError) as error:
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
    transformers' parser of dataclasses, with its flags in groups and errors as `ValueError`.

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

    def error(self, message: str) -> NoReturn:  # argparse would print the whole usage first
        raise ValueError(message)
