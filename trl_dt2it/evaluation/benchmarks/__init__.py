"""The benchmarks that `evaluate` knows, by name.

To add a benchmark:

1. Write a file beside this one, such as `vl_rewardbench.py`, and add its [`Benchmark`] to `BENCHMARKS`. The file holds
   an adapter from a published row to a preference pair with `pair_id` (`pair_identity`) and `category`; the number of
   rows of each release in `sizes`; and, unless its authors count pairs overall and by category, `count` and
   `averages`. The split of an existing [`~trl_dt2it.data.sources.Source`] needs no file. Published scores go into
   `PUBLISHED` in `../results.py`.
2. Test it in `tests/evaluation/test_benchmarks.py`.
3. Describe it in a line of `docs/evaluation.md`.

The command line, evaluation sets of a training, cards and reports take it from here.
"""

from __future__ import annotations

from ...data.sources.t2i import HPDV2_TEST, HPDV3, IMAGEREWARD
from .benchmark import Benchmark
from .mm_rlhf_rewardbench import MM_RLHF_REWARDBENCH
from .mmrb2 import MMRB2
from .multimodal_rewardbench import MULTIMODAL_REWARDBENCH
from .omni_rewardbench import OMNI_REWARDBENCH_T2I, OMNI_REWARDBENCH_TI2T
from .vl_rewardbench import VL_REWARDBENCH


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        VL_REWARDBENCH,
        MULTIMODAL_REWARDBENCH,
        MM_RLHF_REWARDBENCH,
        # Not in the paper.
        MMRB2,
        OMNI_REWARDBENCH_TI2T,
        OMNI_REWARDBENCH_T2I,
        Benchmark("hpdv2-test", "HPDv2, test split", HPDV2_TEST),
        Benchmark("hpdv3-test", "HPDv3, test split", HPDV3),
        Benchmark("imagereward-test", "ImageRewardDB, test split", IMAGEREWARD),
    )
}

# Benchmarks of the paper, and of its pooled mean.
PAPER_BENCHMARKS = ("vl-rewardbench", "multimodal-rewardbench", "mm-rlhf-rewardbench")


def find_benchmark(name: str) -> Benchmark:
    """Look up a benchmark."""
    if name not in BENCHMARKS:
        raise ValueError(f"`{name}` is no known benchmark. Known are {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]
