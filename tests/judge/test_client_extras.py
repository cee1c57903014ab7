"""Without the extra, what needs it says so, and what does not works."""

import pytest

from ..processes import Run
from .runs import write_error_without


@pytest.mark.parametrize("package", ["openai", "pydantic", "json_repair"])
def test_a_missing_package_is_one_sentence(package, tmp_path):
    Run(write_error_without, package, str(tmp_path / "s.jsonl"), str(tmp_path / "result")).finish()
    expected = f"The judge needs `{package}`; run `pip install 'trl-dt2it[judge]'`."
    assert (tmp_path / "result").read_text() == expected
