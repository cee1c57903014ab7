"""A model sharded over two processes: the same loss and gradients."""

import pytest

from ..families import family_dir
from ..processes import start_script
from .launching import HERE


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava"])
def test_fully_sharded_model_has_the_same_gradients(family):
    output = start_script(HERE / "fsdp_script.py", family_dir(family), num_processes=2).finish()
    assert "rank 0 agrees" in output and "rank 1 agrees" in output
    assert output.count("in one row") == (0 if family == "gemma3" else 2)
