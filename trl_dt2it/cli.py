"""`trl-dt2it VERB ...`: the recipes by one command, with help that shows how, and errors in one sentence.

A verb is a recipe and nothing more: the flags are the recipe's, and so is what happens. The recipes are files of
`recipes/` in a checkout and lie within the package where it was installed from a wheel.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from .cli_help import help_of, overview
from .cli_verbs import VERBS, Verb


PACKAGE = Path(__file__).parent
# What the launcher gets, and the recipe does not; words as in TRL's own command line.
LAUNCHER_FLAGS = ("--num_processes", "--accelerate_config")


class Misuse(Exception):
    """What the user has to change, in one sentence."""


def recipes_folder() -> Path:
    """The folder of the recipes, with `configs/` and `accelerate/`."""
    inside = PACKAGE / "recipes"
    return inside if inside.is_dir() else PACKAGE.parent / "recipes"


def load_recipe(name: str) -> ModuleType:
    """
    A recipe as a module.

    Args:
        name (`str`):
            Its name, without `.py`.

    Returns:
        `ModuleType`: with `main`, and `make_parser` where its arguments are dataclasses; each call loads it anew.
    """
    spec = spec_from_file_location(name, recipes_folder() / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"There is no recipe {name}.")
    module = module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str] | None = None) -> int:
    """
    The command line.

    Args:
        argv (`Sequence[str]`, *optional*):
            Verb and flags; by default those of the process.

    Returns:
        `int`: 0 if all went well, 2 if something was asked for that cannot be. An error that no sentence explains is
        raised as it is.

    Example:

    ```python
    >>> from trl_dt2it.cli import main

    >>> main(["trane"])
    2
    ```
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from . import __version__

        sys.stdout.write(f"trl-dt2it {__version__}\n")
        return 0
    name, flags = argv[0], argv[1:]
    if name not in VERBS:
        return complain("trl-dt2it", f"There is no verb {name!r}; choose among {', '.join(VERBS)}.")
    verb, program = VERBS[name], f"trl-dt2it {name}"
    try:
        if {"-h", "--help"} & set(flags):
            sys.stdout.write(help_of(name, verb, load_recipe(verb.recipe).make_parser().dataclass_types))
        elif "--help_all" in flags or "--help-all" in flags:
            sys.stdout.write(parser_of(load_recipe(verb.recipe), program).format_help())
        elif any(flag.split("=")[0].replace("-", "_").replace("__", "--", 1) in LAUNCHER_FLAGS for flag in flags):
            launch(name, verb, flags)
        else:
            run(verb, program, with_known_config(flags))
    except Misuse as error:
        return complain(program, f"{error} See {program} --help.")
    except Exception as error:
        if "--traceback" in flags or not is_for_users(error):
            raise
        return complain(program, str(error))
    return 0


def run(verb: Verb, program: str, flags: list[str]) -> None:
    """Runs a recipe in this process."""
    recipe = load_recipe(verb.recipe)
    flags = [flag for flag in flags if flag != "--traceback"]
    parser = parser_of(recipe, program)
    try:
        arguments = parser.parse_args_and_config(flags)
    except FileNotFoundError as error:
        raise Misuse(f"There is no file {error.filename}.") from error
    except (ValueError, TypeError, OSError) as error:
        raise Misuse(unknown_flag(str(error), parser) or sentence(error)) from error
    except Exception as error:  # PyYAML's own, of a file that is none
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise Misuse(f"The configuration is no YAML: {sentence(error)}") from error
    recipe.main(*arguments)


def parser_of(recipe: ModuleType, program: str) -> Any:
    """The recipe's parser, whose complaints are [`Misuse`]."""
    parser = recipe.make_parser()
    parser.prog = program

    def complain_instead(message: str) -> None:
        raise Misuse(f"{message[0].upper()}{message[1:]}.")

    parser.error = complain_instead
    return parser


def unknown_flag(message: str, parser: Any) -> str | None:
    """Of the parser's complaint about a flag or key that it does not know, a sentence that names it; else `None`."""
    found = re.match(r"(Some specified arguments are not used|Unknown arguments from config file).*?'(.+?)'", message)
    if found is None:
        return None
    kind, name = ("flag", found[2]) if found[1].startswith("Some") else ("key in the YAML file", found[2].lstrip("-"))
    known = [one.name for dataclass_type in parser.dataclass_types for one in fields(dataclass_type)]
    near = get_close_matches(name.strip("-").replace("-", "_"), known, n=1)
    meant = f"; did you mean {name[: len(name) - len(name.lstrip('-'))]}{near[0]}?" if near else "."
    return f"There is no {kind} {name}{meant}"


def with_known_config(flags: list[str]) -> list[str]:
    """The flags, with the path of a configuration that was given by its name, such as `--config digits`."""
    flags = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
    if "--config" not in flags:
        return flags
    place = flags.index("--config") + 1
    if place == len(flags) or flags[place].startswith("--"):
        raise Misuse("`--config` needs a YAML file, or the name of a configuration that comes with the package.")
    return [*flags[:place], str(find_yaml(flags[place], "configs")), *flags[place + 1 :]]


def find_yaml(given: str, kind: str) -> Path:
    """A YAML file: the one at this path, or else the one of `recipes/configs` or `recipes/accelerate` so named."""
    known = {path.stem: path for path in sorted((recipes_folder() / kind).glob("*.yaml"))}
    if Path(given).is_file():
        return Path(given)
    if given in known:
        return known[given]
    raise Misuse(f"There is no file {given}; configurations that come with the package are {', '.join(known)}.")


def launch(name: str, verb: Verb, flags: list[str]) -> None:
    """Starts the verb on several processes by `accelerate launch`, in place of this process."""
    import torch  # where it has no accelerator, the launcher starts several processes only if told that it had

    if not verb.is_launched:
        raise Misuse(f"{name} runs in one process.")
    own, rest = [], []
    words = iter([part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--") else [flag])])
    for word in words:
        option = "--" + word[2:].replace("-", "_")
        if not word.startswith("--") or option not in LAUNCHER_FLAGS:
            rest.append(word)
            continue
        value = next(words, None)
        if value is None or value.startswith("--"):
            raise Misuse(f"`{option}` needs a value.")
        if option == "--accelerate_config":
            own += ["--config_file", str(find_yaml(value, "accelerate"))]
        elif value.isdecimal() and int(value) > 0:
            own += [option, value, *([] if torch.accelerator.is_available() else ["--multi_gpu"])]
        else:
            raise Misuse(f"`--num_processes` is {value!r}; give a number from 1 on.")
    rest = with_known_config(rest)
    command = [sys.executable, "-m", "accelerate.commands.launch", *own, "-m", "trl_dt2it.cli", name, *rest]
    sys.stdout.flush()
    os.execv(sys.executable, command)


def is_for_users(error: Exception) -> bool:
    """Whether the message says what to do: errors of this package and its recipes, and of files and of the Hub."""
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("datasets", "huggingface_hub"):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = Path(trace.tb_frame.f_code.co_filename).resolve() if trace is not None else Path()
    is_ours = any(folder.resolve() in raised_in.parents for folder in (PACKAGE, recipes_folder()))
    return is_ours and isinstance(error, (ValueError, RuntimeError, ImportError))


def sentence(error: object) -> str:
    """A message on one line."""
    return " ".join(str(error).split())


def complain(program: str, message: str) -> int:
    """Says on standard error what is wrong, and gives the exit status of misuse."""
    sys.stderr.write(f"{program}: {sentence(message)}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
