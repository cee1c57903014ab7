"""Without the extra, what needs it says so, and what does not works."""

import pytest

from .runs import finish, start


@pytest.mark.parametrize("package", ["openai", "pydantic", "json_repair"])
def test_a_missing_package_is_one_sentence(package, tmp_path, forks):
    start(forks, missing=package, store=str(tmp_path / "s.jsonl"), result=str(tmp_path / "result"))
    assert finish(forks) == 0
    expected = f"The judge needs `{package}`; run `pip install 'trl-dt2it[judge]'`."
    assert (tmp_path / "result").read_text() == expected
