"""Every private name of another library that the package or a recipe touches is named in `test_canaries.py`."""

import ast
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from accelerate import Accelerator
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer
from trl import RewardTrainer


ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("trl_dt2it/**/*.py"), *ROOT.glob("recipes/*.py")])
PUBLIC = {"_asdict", "_fields", "_make", "_replace"}  # of named tuples: documented, in spite of the underscore
BY_NAME = ("getattr", "setattr", "hasattr", "delattr")
# Classes whose objects are handled most: their private names are found also where one of ours is called alike.
HANDLED = (Dataset, IterableDataset, Trainer, RewardTrainer, PreTrainedModel, Accelerator)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in ("_", *PUBLIC)


def defined(tree: ast.AST) -> set[str]:
    """Names that a file itself gives to something."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def touched(tree: ast.AST) -> dict[str, int]:
    """Private names that a file reads, imports, sets or gives as a keyword, each with a line."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.append((node.attr, node.lineno))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [(name, node.lineno) for name in parts]
        elif isinstance(node, ast.Import):
            found += [(name, node.lineno) for alias in node.names for name in alias.name.split(".")]
        elif isinstance(node, ast.keyword) and node.arg:
            found.append((node.arg, node.value.lineno))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            found += [(one.value, node.lineno) for one in node.args if isinstance(getattr(one, "value", None), str)]
    return {name: line for name, line in found if is_private(name)}


def of_others(tree: ast.AST) -> set[str]:
    """Private names that a file reads or sets of anything but `self`."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if is_private(node.attr) and not is_self(node.value)}


def overridden(path: Path, tree: ast.AST, own: set[str]) -> dict[str, int]:
    """Private names that a class of ours shares with a class of another library that it is derived from."""
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.ClassDef) and node.bases):
            continue
        inside = {n.name: n.lineno for n in node.body if isinstance(n, ast.FunctionDef)}
        inside |= {n.attr: n.lineno for n in ast.walk(node) if isinstance(n, ast.Attribute) and is_self(n.value)}
        inside = {name: line for name, line in inside.items() if is_private(name) and name in own}
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not inside or not module.startswith("trl_dt2it."):
            continue
        kind = getattr(import_module(module), node.name, None)
        for base in kind.__mro__[1:] if kind is not None else ():
            if base.__module__.split(".")[0] in ("trl_dt2it", *sys.stdlib_module_names):
                continue
            words = set(re.findall(r"\w+", inspect.getsource(base)))
            found |= {name: line for name, line in inside.items() if name in words}
    return found


def host_names(files: list[Path]) -> dict[str, str]:
    """Private names of other libraries, each with a place that touches it."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    own = set().union(*map(defined, trees.values()))
    handled = set(re.findall(r"\w+", "".join(map(inspect.getsource, HANDLED))))
    found: dict[str, str] = {}
    for path, tree in trees.items():
        alike = of_others(tree) & handled
        names = {name: line for name, line in touched(tree).items() if name not in own or name in alike}
        names |= overridden(path, tree, own)
        found |= {name: f"{path.relative_to(ROOT)}:{line}" for name, line in names.items()}
    return found


@pytest.fixture(scope="module")
def named() -> set[str]:
    return set(re.findall(r"\b_\w+", (ROOT / "tests/test_canaries.py").read_text(encoding="utf-8")))


def test_every_private_name_of_another_library_has_a_canary(named):
    found = host_names(FILES)
    assert {"_prepare_dataset", "_signature_columns", "_flash_attention_forward", "_indices"} <= set(found)
    missing = [f"{name} ({place})" for name, place in sorted(found.items()) if name not in named]
    assert not missing, f"no canary in tests/test_canaries.py for {', '.join(missing)}"


def test_the_scan_sees_each_way_to_touch_a_name(tmp_path, monkeypatch):
    path = tmp_path / "trl_dt2it/example.py"
    path.parent.mkdir()
    path.write_text(
        "from transformers._one import _two\nimport torch._three\n_own = 1\n"
        "def f(x, _argument):\n    x._four(_five=_own)\n    setattr(x, '_six', getattr(x, '_seven'))\n"
        "    x._own = x._fields = x.__dict__ = _argument\n    return {'_text': '_eight'}\n"
        "_models = 2\ndef g(x):\n    return x._models\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert set(host_names([path])) == {"_one", "_two", "_three", "_four", "_five", "_six", "_seven", "_models"}
