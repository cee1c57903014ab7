"""A model sharded over two processes: the same loss and gradients."""

import pytest

from ..families import family_dir
from .launching import launch


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava"])
def test_fully_sharded_model_has_the_same_gradients(family):
    output = launch("fsdp_script.py", 2, str(family_dir(family)))
    assert "rank 0 agrees" in output and "rank 1 agrees" in output
    assert output.count("in one row") == (0 if family == "gemma3" else 2)
