"""The outcomes that `benchmarks/trl_suite.py` reports, and that its list of differences is that of the docs."""

import re
from pathlib import Path

import pytest

from ..benchmark_modules import benchmark_module


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def suite():
    with benchmark_module("trl_suite") as module:
        yield module


@pytest.mark.parametrize(
    ("name", "theirs", "ours", "verdict"),
    [
        ("test_train", "", "", "passes"),
        ("test_train", "", "KeyError: 'chosen_ids'", "FAILS"),
        ("test_train", "No GPU", "No GPU", "fails with TRL's classes too"),
        ("test_train", "No GPU", "", "passes"),
        ("test_train_with_chat_template_kwargs", "", "KeyError: 'chosen_ids'", "differs by design"),
        ("test_train_with_chat_template_kwargs", "", "KeyError: 'prompt'", "FAILS"),
        ("test_train_with_chat_template_kwargs", "", "", "listed, but passes"),
        ("test_init_with_eval_dataset[dataset]", "", "assert 'chosen_ids' in {'chosen': ''}", "differs by design"),
        ("test_init_with_eval_dataset[none]", "", "assert 'chosen_ids' in {'chosen': ''}", "FAILS"),
    ],
)
def test_verdicts(suite, name, theirs, ours, verdict):
    assert suite.judge(name, theirs, ours)[0] == verdict


def test_the_docs_name_each_test_that_differs(suite):
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8").split("\n## ")[1]  # from TRL
    named = set(re.findall(r"`(test_\w+)`", page))
    results = (ROOT / "benchmarks" / "results" / "trl_suite.md").read_text(encoding="utf-8")
    differing = set(re.findall(r"\| `(test_\w+).*differs by design", results))
    assert named == differing and "| FAILS | 0 |" in results and "| listed, but passes | 0 |" in results
    for name in named:
        assert any(re.fullmatch(one.tests, f"{name}{case}") for one in suite.BY_DESIGN for case in ("", "[x]")), name
