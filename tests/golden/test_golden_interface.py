"""Golden interface: public names and their arguments, verbs, flags and YAML keys, benchmarks and their metrics."""

import inspect
import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import yaml
from trl import RewardConfig

import trl_dt2it
from tests.data.fixtures_as_rows import fixture
from trl_dt2it import MultimodalRewardConfig
from trl_dt2it.cli import main
from trl_dt2it.data import REASONS
from trl_dt2it.evaluation import BENCHMARKS, compute_metrics, evaluate, read_benchmark

from .golden import check


ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


def shown(value: Any) -> str:
    """A default, without where it lies in memory or in which module."""
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__name__
    return re.sub(r" at 0x\w+", "", repr(value))


def default_of(one) -> str:
    """Of a field of a data class."""
    if one.default is MISSING and one.default_factory is MISSING:
        return "required"
    return shown(one.default if one.default_factory is MISSING else one.default_factory())


def test_public_names():
    """Of each package: functions and methods with their arguments, classes of data with their fields."""
    packages = [trl_dt2it, *(import_module(f"trl_dt2it.{path.parent.name}") for path in _inits())]
    found = {}
    for package in packages:
        if names := [name for name in getattr(package, "__all__", ()) if name != "__version__"]:
            found[package.__name__] = {name: _described(getattr(package, name)) for name in names}
    check("public_names", found)


def _inits() -> list[Path]:
    return sorted(path for path in Path(trl_dt2it.__file__).parent.glob("*/__init__.py"))


def _described(value: Any) -> Any:
    if inspect.isclass(value):
        methods = {} if issubclass(value, (Exception, RewardConfig)) else _methods(value)
        own = [one for one in fields(value) if one.name in value.__annotations__] if is_dataclass(value) else []
        return {**methods, **({"fields": {one.name: default_of(one) for one in own}} if own else {})}
    if inspect.isfunction(value):
        return _arguments(value)
    return [str(one) for one in value] if isinstance(value, (dict, tuple, list)) else type(value).__name__


def _methods(value: type) -> dict[str, Any]:
    found = {"()": _arguments(value)}
    for name, one in vars(value).items():
        # What overrides a method of a base is known there.
        if not name.startswith("_") and not any(hasattr(base, name) for base in value.__bases__):
            one = one.__func__ if isinstance(one, (classmethod, staticmethod)) else one
            found |= {name: _arguments(one)} if inspect.isfunction(one) else {}
    return found


def _arguments(function: Any) -> list[str]:
    """Each with its kind and its default."""
    marks = {
        inspect.Parameter.KEYWORD_ONLY: "=",
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    return [
        f"{marks.get(one.kind, '')}{one.name}" + ("" if one.default is one.empty else f" {shown(one.default)}")
        for one in inspect.signature(function).parameters.values()
        if one.name not in ("self", "cls")
    ]


def load_recipe(name: str) -> Any:
    spec = spec_from_file_location(f"golden_{name}", ROOT / "recipes" / f"{name}.py")
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", RECIPES)
def test_arguments_of_recipes(name):
    """Keys of YAML files and flags; what a class has of TRL's or of transformers' is theirs."""
    parser = load_recipe(name).make_parser()
    found = {"classes": [kind.__name__ for kind in parser.dataclass_types], "fields": {}, "flags": {}}
    for kind in parser.dataclass_types:
        hints = get_type_hints(kind)
        for one in fields(kind):
            if _is_ours(kind, one.name):
                found["fields"][one.name] = [str(hints[one.name]), default_of(one)]
    for action in parser._actions:
        if action.dest in found["fields"]:
            found["flags"][action.dest] = [action.option_strings, action.nargs, action.choices, shown(action.default)]
    check(f"recipe_{name}", found)


def _is_ours(kind: type, name: str) -> bool:
    owner = next(one for one in kind.__mro__ if name in one.__dict__.get("__annotations__", {}))
    return not owner.__module__.startswith(("trl.", "transformers."))


def test_keys_of_configurations():
    folder = ROOT / "recipes" / "configs"
    check("yaml_keys", {path.name: yaml.safe_load(path.read_text("utf-8")) for path in sorted(folder.glob("*.yaml"))})


def test_configuration_of_the_trainer():
    """Own fields, and those for which TRL has another default."""
    theirs = {one.name: default_of(one) for one in fields(RewardConfig)}
    hints = get_type_hints(MultimodalRewardConfig)
    own = {
        one.name: [str(hints[one.name]), default_of(one)]
        for one in fields(MultimodalRewardConfig)
        if theirs.get(one.name) != default_of(one) or one.name in MultimodalRewardConfig.__annotations__
    }
    check("reward_config", own)


def test_verbs_and_flags(capsys):
    assert main(["--help"]) == 0
    verbs = re.findall(r"^    ([a-z-]+)  +[A-Z]", capsys.readouterr().out, flags=re.MULTILINE)
    found = {}
    for verb in verbs:
        assert main([verb, "--help"]) == 0
        text = capsys.readouterr().out
        # Those of the help alone, without the examples.
        flags = re.findall(r"^  --(\w+) ", text.split("options:")[1], flags=re.MULTILINE)
        assert flags[-2:] == ["help_all", "traceback"]
        assert ("--num_processes N" in text) == ("--accelerate_config" in text)
        found[verb] = flags[:-2]
    check("cli", found)


SAMPLES = {
    "vl-rewardbench": "vl_rewardbench",
    "multimodal-rewardbench": "multimodal_rewardbench",
    "mm-rlhf-rewardbench": "mm_rlhf_rewardbench",
    "mmrb2-t2i": "mmrb2_hf",
    "omni-rewardbench-ti2t": "omnirewardbench_ti2t",
    "omni-rewardbench-t2i": "omnirewardbench_t2i",
    "hpdv2-test": "hpdv2_test",
    "hpdv3-test": "hpdv3",
    "imagereward-test": "imagerewarddb",
}


def test_benchmarks():
    found = {}
    for name, benchmark in BENCHMARKS.items():
        raw = fixture(SAMPLES[name])
        rows = read_benchmark(name, raw[:1] if name == "mmrb2-t2i" else raw)  # the other is not a pair of images
        result = evaluate(lambda some: np.array([[1.0, 0.0]] * len(some)), name, rows, num_resamples=10).to_dict()
        about = ("title", "headline", "averages", "sizes", "key_columns", "optional_category", "both_orders")
        found[name] = {
            **{one: getattr(benchmark, one) for one in about},
            "columns": rows.column_names,
            "rows": rows.select_columns(["pair_id", "group_id", "category"]).to_list(),
            "metrics": compute_metrics(name, rows, [1.0] * len(rows), [0.0] * len(rows)),
            "result": {one: list(value) if isinstance(value, dict) else value for one, value in result.items()},
            "settings": list(result["settings"]),
            "rows_sha256": result["settings"]["rows_sha256"],
        }
    check("benchmarks", found)
    check("reasons", list(REASONS))
