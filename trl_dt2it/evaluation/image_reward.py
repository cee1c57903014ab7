"""The test split of ImageRewardDB: pairs of images of a caption with different ranks, as questions about both."""

from __future__ import annotations

from ..data.sources.t2i_groups import IMAGEREWARD
from .benchmark import Benchmark, by_category, by_group_id
from .mmrb2 import no_category


IMAGE_REWARD = Benchmark(
    name="imagereward-test",
    title="ImageRewardDB, test split",
    source=IMAGEREWARD,
    category_of=no_category,
    unit_of=by_group_id,
    count=by_category,
    key_columns=("category",),
)
