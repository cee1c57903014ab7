"""`trl-dt2it VERB ...`: a verb per recipe, with the recipe's flags and the recipe's docstring as its help."""

import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple, NoReturn

from yaml import YAMLError

from . import __version__


PACKAGE = Path(__file__).resolve().parent
# Installed from a wheel, the recipes are part of the package; in a checkout they lie beside it.
RECIPES = PACKAGE / "recipes" if (PACKAGE / "recipes").is_dir() else PACKAGE.parent / "recipes"
FORMATTER: Any = partial(RawDescriptionHelpFormatter, max_help_position=35, width=110)


class Verb(NamedTuple):
    """A file of `recipes/` without `.py`, what it does, and whether it may run on several processes."""

    recipe: str
    summary: str
    is_launched: bool = False


VERBS = {
    "prepare": Verb("prepare_data", "Build a training set from public preference sets, without benchmark rows."),
    "audit": Verb("audit_data", "Count usable rows, and measure how far style alone predicts the chosen answer."),
    "construct": Verb("construct_preferences", "Build pairs from prompts with images, as a judge decides."),
    "train": Verb("train_reward_model", "Train a reward model.", True),
    "curate": Verb("dt2it", "Find wrong labels in rounds, and train with and without them.", True),
    "score": Verb("score_data", "Add the rewards of a trained model to a dataset.", True),
    "evaluate": Verb("evaluate", "Measure a reward model on public benchmarks, beside published scores.", True),
    "best-of-n": Verb("best_of_n", "Pick the best of n sampled answers to prompts with images.", True),
    "dpo-pairs": Verb("build_dpo_pairs", "Build DPO pairs from a model's own answers, by reward gap.", True),
    "report": Verb("report", "Write one HTML page about a run of rounds and about evaluations."),
}


class Misuse(Exception):
    """An error that tells the user in one sentence what to change."""


def main(argv: list[str] | None = None) -> int:
    """Run a verb and return 0, or 2 on misuse. An error whose message does not tell the user what to do is raised."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "--version"):
        sys.stdout.write(f"trl-dt2it {__version__}\n" if argv[:1] == ["--version"] else make_parser().format_help())
        return 0 if argv else 2
    name, flags = argv[0], argv[1:]
    program = f"trl-dt2it {name}" if name in VERBS else "trl-dt2it"
    try:
        if name not in VERBS:
            raise Misuse(f"There is no verb {name!r}; choose among {', '.join(VERBS)}.")
        if {"-h", "--help"} & set(flags):
            make_help(name).print_help()
        elif {"--help_all", "--help-all"} & set(flags):
            parser_of(load_recipe(VERBS[name].recipe), program).print_help()
        else:
            run(name, *split_flags(flags))
        return 0
    except Misuse as error:
        message = f"{error} See {program} --help."
    except Exception as error:
        if "--traceback" in flags or not is_for_users(error):
            raise
        message = str(error)
    sys.stderr.write(f"{program}: {' '.join(message.split())}\n")
    return 2


def make_parser() -> ArgumentParser:
    """Make the parser of the overview: a subcommand per verb, whose flags are its recipe's."""
    about = "Multimodal reward models, from preference pairs to a report."
    first = "Train on real handwriting, in two minutes on 2 cores:\n\n  trl-dt2it train --config digits"
    parser = ArgumentParser("trl-dt2it", description=about, epilog=first, formatter_class=FORMATTER)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB [flags]", help="trl-dt2it VERB --help shows examples.")
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=verb.summary, add_help=False)
    return parser


def make_help(name: str) -> ArgumentParser:
    """Make the short help of a verb: its main flags, then the recipe's docstring with its examples."""
    recipe = load_recipe(VERBS[name].recipe)
    kinds = recipe.make_parser().dataclass_types
    helps = {flag.name: flag.metadata.get("help", "") for kind in reversed(kinds) for flag in fields(kind)}
    main_flags = getattr(recipe, "MAIN_FLAGS", None) or [flag.name for flag in fields(kinds[0])]
    shown = {flag: re.split(r"(?<=[.])\s", helps[flag])[0] for flag in main_flags}
    shown["config"] = "YAML file with such keys, or the name of a file that comes with the package."
    if VERBS[name].is_launched:
        shown["num_processes N"] = f"Processes, as with accelerate launch --num_processes N -m trl_dt2it.cli {name}."
        shown["accelerate_config"] = "YAML file for accelerate launch, or such a name."
    shown |= {"help_all": f"Show all {len(helps)} flags.", "traceback": "Show where an error came from."}
    about, _, examples = (recipe.__doc__ or "").partition("\n\n")
    page = ArgumentParser(f"trl-dt2it {name}", "%(prog)s [flags]", about, examples, formatter_class=FORMATTER)
    for flag, text in shown.items():
        page.add_argument(f"--{flag}", metavar="", help=text.replace("%", "%%"))
    return page


def load_recipe(name: str) -> Any:
    """Load a recipe anew, under a name that cannot be another package's."""
    spec: Any = spec_from_file_location(f"trl_dt2it.recipes.{name}", RECIPES / f"{name}.py")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def parser_of(recipe: Any, program: str) -> Any:
    """Make the recipe's parser, which raises [`Misuse`]."""

    def error(message: str) -> NoReturn:
        raise Misuse(f"{message[0].upper()}{message[1:]}.")

    parser = recipe.make_parser()
    parser.prog, parser.error = program, error
    return parser


def split_flags(flags: list[str]) -> tuple[list[str], list[str]]:
    """Split off flags of `accelerate launch`, and resolve names of YAML files that come with the package."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("config", "num_processes", "accelerate_config"):
        parser.add_argument(*{f"--{option}", f"--{option.replace('_', '-')}"}, dest=option, nargs="?", const="")
    own, rest = parser.parse_known_args(flags)
    launcher = []
    if own.accelerate_config is not None:
        launcher += ["--config_file", find_yaml("accelerate_config", own.accelerate_config, "accelerate")]
    if own.num_processes is not None:
        if not own.num_processes.isdecimal() or int(own.num_processes) == 0:
            raise Misuse(f"`--num_processes` is {own.num_processes!r}; give a number from 1 on.")
        launcher += ["--num_processes", own.num_processes]
    config = [] if own.config is None else ["--config", find_yaml("config", own.config, "configs")]
    return launcher, [*config, *rest]


def find_yaml(option: str, given: str, kind: str) -> str:
    """Return the YAML file at this path, or else of this name in `recipes/configs` or `recipes/accelerate`."""
    known = {path.stem: str(path) for path in sorted((RECIPES / kind).glob("*.yaml"))}
    if not given:
        raise Misuse(f"`--{option}` needs a YAML file, or the name of a configuration that comes with the package.")
    if not Path(given).is_file() and given not in known:
        raise Misuse(f"There is no file {given}; configurations that come with the package are {', '.join(known)}.")
    return given if Path(given).is_file() else known[given]


def run(name: str, launcher: list[str], flags: list[str]) -> None:
    """Run the verb's recipe in this process, or replace this process by `accelerate launch` of the verb."""
    if launcher:
        import torch  # without an accelerator, the launcher starts several processes only with `--multi_gpu`

        if not VERBS[name].is_launched:
            raise Misuse(f"{name} runs in one process.")
        if "--num_processes" in launcher and not torch.accelerator.is_available():
            launcher = [*launcher, "--multi_gpu"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "trl_dt2it.cli", name, *flags]
        os.execv(sys.executable, command)
    recipe = load_recipe(VERBS[name].recipe)
    parser = parser_of(recipe, f"trl-dt2it {name}")
    try:
        arguments = parser.parse_args_and_config([flag for flag in flags if flag != "--traceback"])
    except (ValueError, TypeError, OSError, YAMLError) as error:
        raise Misuse(explain(error, parser)) from error
    recipe.main(*arguments)


def explain(error: Exception, parser: Any) -> str:
    """Return the parser's message or, about an unknown flag or key, a sentence that names a similar name."""
    message = f"The configuration is no YAML: {error}" if isinstance(error, YAMLError) else str(error)
    found = re.match(r"(Some specified arguments|Unknown arguments from config).*?'(-*)(.+?)'", message)
    if found is None:
        return message
    noun, dashes = ("flag", found[2]) if found[1].startswith("Some") else ("key in the YAML file", "")
    known = [flag.name for kind in parser.dataclass_types for flag in fields(kind)]
    near = get_close_matches(found[3].replace("-", "_"), known, n=1)
    return f"There is no {noun} {dashes}{found[3]}" + (f"; did you mean {dashes}{near[0]}?" if near else ".")


def is_for_users(error: Exception) -> bool:
    """Tell errors of this package, its recipes, files and the Hub, whose messages say what to do, from others."""
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("datasets", "huggingface_hub"):
        return True
    raised_in = Path(extract_tb(error.__traceback__)[-1].filename).resolve()
    return not {PACKAGE, RECIPES}.isdisjoint(raised_in.parents) and isinstance(
        error, (ValueError, RuntimeError, ImportError)
    )


if __name__ == "__main__":
    sys.exit(main())
