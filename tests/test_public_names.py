"""Public names: each has a docstring, with its arguments and what it returns, and most have an example that runs."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from .test_lazy import homes


ROOT = Path(__file__).parents[1]
PACKAGES = ["trl_dt2it", *sorted(f"trl_dt2it.{path.parent.name}" for path in ROOT.glob("trl_dt2it/*/__init__.py"))]
NAMES = [
    (package, name)
    for package in PACKAGES
    for name in getattr(import_module(package), "__all__", ())
    if name != "__version__"
]
# What one gets and does not make, and what others call: their examples are those of what gives or calls them.
WITHOUT_EXAMPLE = {
    *("BalanceReport", "BlindReport", "DistillPlan", "DistillReport", "StyleReport", "ValidationReport"),
    *("EvalResult", "PooledResult", "PublishedScore", "Decision", "NoiseEstimate", "JudgeReply", "UsageReport"),
    *("LookingReport", "JudgeError", "RowError", "SourceSettings", "TokenCounter"),
    # A hook of the trainer's, and a reader of a file that another program writes; tests of their own run both.
    *("training_metrics", "split_predictions"),
}
BLOCKS = "\n".join(
    block
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    for block in re.findall(
        r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
)


def is_constant(value: object) -> bool:
    return not (inspect.isclass(value) or inspect.isfunction(value))


@pytest.mark.parametrize(("package", "name"), NAMES, ids=lambda text: text)
def test_a_public_name_is_documented(package, name):
    value = getattr(import_module(package), name)
    if is_constant(value):
        source = inspect.getsource(import_module(f"{package}.{homes(package)[name]}"))
        before = source[: re.search(rf"^{name}\b", source, flags=re.MULTILINE).start()].rstrip().splitlines()[-1]
        after = source[re.search(rf"^{name}\b", source, flags=re.MULTILINE).start() :]
        assert before.startswith("#") or '"""' in after, f"{name} has no comment above it"
        return
    text = inspect.getdoc(value) or ""
    assert len(text.split()) > 4 and text != inspect.getdoc(dict), name
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    arguments = [one for one in inspect.signature(value).parameters if one != "self"]
    if arguments:
        listed = text[re.search(r"^(Args|Parameters):$", text, flags=re.MULTILINE).start() :]
        named = {
            one
            for line in re.findall(r"^ {4,8}([\w*, ]+?)(?: \(|:)", listed, flags=re.MULTILINE)
            for one in re.split(r"[ ,*]+", line)
        }
        missing = [one for one in arguments if one not in named]
        # Those of a base class are documented there.
        assert not missing or "besides" in text.lower() or "as in [`" in text or "[`~trl." in text, (name, missing)
    if inspect.isfunction(value) and inspect.signature(value).return_annotation not in ("None", None):
        assert re.search(r"^(Returns|Yields):$", text, flags=re.MULTILINE), f"{name} does not say what it returns"


@pytest.mark.parametrize(("package", "name"), NAMES, ids=lambda text: text)
def test_a_public_name_has_an_example(package, name):
    value = getattr(import_module(package), name)
    if is_constant(value) or name in WITHOUT_EXAMPLE:
        return
    assert re.search(rf"\b{name}\b", BLOCKS) or ">>>" in (inspect.getdoc(value) or ""), name


def test_no_exemption_is_stale():
    assert WITHOUT_EXAMPLE <= {name for _, name in NAMES}
