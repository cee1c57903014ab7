"""Scores of other models as they were published, to stand beside one's own.

They are not measured here. Papers differ in release, precision and handling of ties, and some totals do not follow
from their own parts; where that is known, `note` says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedScore:
    """
    A score that somebody published.

    Parameters:
        model (`str`):
            The model.
        benchmark (`str`):
            Name of the benchmark, as in [`BENCHMARKS`], or `"pooled"` for the share of right pairs of all three.
        metric (`str`):
            Name of the metric, as in [`compute_metrics`].
        value (`float`):
            From 0 to 1.
        source (`str`):
            Who says so.
        note (`str`, *optional*, defaults to `""`):
            What to know of it.
    """

    model: str
    benchmark: str
    metric: str
    value: float
    source: str
    note: str = ""


_VL, _MM, _MMRLHF, _POOLED = "vl-rewardbench", "multimodal-rewardbench", "mm-rlhf-rewardbench", "pooled"
_DT2IT = "arXiv 2604.19544, from a copy"
_BASE = "arXiv 2509.16127, tables 8-10"


def _parts(value: int) -> str:
    return f"The paper's own groups give {value / 10:.1f} at the benchmark's group sizes."


PUBLISHED: tuple[PublishedScore, ...] = (
    PublishedScore("DT2IT-MRM 8B", _VL, "overall", 0.835, _DT2IT),
    PublishedScore("DT2IT-MRM 8B", _MM, "overall", 0.793, _DT2IT),
    PublishedScore("DT2IT-MRM 8B", _MMRLHF, "acc", 0.894, _DT2IT),
    PublishedScore("DT2IT-MRM 8B", _POOLED, "overall", 0.805, _DT2IT),
    PublishedScore("BaseReward 7B", _VL, "overall", 0.8216, _BASE, _parts(861)),
    PublishedScore("BaseReward 7B", _VL, "macro", 0.8085, _BASE),
    PublishedScore("BaseReward 7B", _MM, "overall", 0.728, _BASE),
    PublishedScore("BaseReward 7B", _MMRLHF, "acc", 0.9176, _BASE),
    PublishedScore("BaseReward 7B", _MMRLHF, "acc_plus", 0.8043, _BASE),
    PublishedScore("BaseReward 7B", _POOLED, "overall", 0.752, _DT2IT),
    PublishedScore("BaseReward, ensemble", _VL, "overall", 0.8441, _BASE, _parts(872)),
    PublishedScore("BaseReward, ensemble", _VL, "macro", 0.8291, _BASE),
    PublishedScore("BaseReward, ensemble", _MM, "overall", 0.736, _BASE),
    PublishedScore("BaseReward, ensemble", _MMRLHF, "acc", 0.9294, _BASE),
    PublishedScore("BaseReward, ensemble", _MMRLHF, "acc_plus", 0.8043, _BASE),
    PublishedScore("Skywork-VL-Reward 7B", _VL, "overall", 0.731, "arXiv 2505.07263", "73.3 after a fix of labels."),
    PublishedScore("Skywork-VL-Reward 7B", _VL, "macro", 0.69, "arXiv 2505.07263"),
    PublishedScore("Skywork-VL-Reward 7B", _MM, "overall", 0.744, _DT2IT),
    PublishedScore("Skywork-VL-Reward 7B", _MMRLHF, "acc", 0.659, _DT2IT),
    PublishedScore("IXC-2.5-Reward 7B", _VL, "overall", 0.658, "arXiv 2501.12368"),
    PublishedScore("IXC-2.5-Reward 7B", _VL, "macro", 0.7, "arXiv 2501.12368"),
    PublishedScore("IXC-2.5-Reward 7B", _MM, "overall", 0.666, _BASE),
    PublishedScore("IXC-2.5-Reward 7B", _MMRLHF, "acc", 0.7118, _BASE),
    PublishedScore("IXC-2.5-Reward 7B", _MMRLHF, "acc_plus", 0.5, _BASE),
    PublishedScore("MM-RLHF-Reward 7B", _VL, "overall", 0.5015, _BASE),
    PublishedScore("MM-RLHF-Reward 7B", _VL, "macro", 0.51, _BASE),
    PublishedScore("MM-RLHF-Reward 7B", _MM, "overall", 0.671, _BASE),
    PublishedScore("MM-RLHF-Reward 7B", _MMRLHF, "acc", 0.82, "arXiv 2502.10391"),
    PublishedScore("MM-RLHF-Reward 7B", _MMRLHF, "acc_plus", 0.63, "arXiv 2502.10391"),
    PublishedScore("R1-Reward (writes verdicts)", _VL, "overall", 0.7192, _BASE, _parts(772)),
    PublishedScore("R1-Reward (writes verdicts)", _VL, "macro", 0.714, _BASE),
    PublishedScore("R1-Reward (writes verdicts)", _MM, "overall", 0.822, _BASE),
    PublishedScore("R1-Reward (writes verdicts)", _MMRLHF, "acc", 0.8059, _BASE),
    PublishedScore("R1-Reward (writes verdicts)", _MMRLHF, "acc_plus", 0.5435, _BASE),
    PublishedScore(
        "OmniReward",
        _VL,
        "overall",
        0.763,
        "issue 3 of OmniReward's repository",
        "Corrected there; an author of DT2IT-MRM measured 72.0.",
    ),
    PublishedScore("Claude 3.7 (writes verdicts)", _MMRLHF, "acc", 0.8235, _BASE),
    PublishedScore("Claude 3.7 (writes verdicts)", _MMRLHF, "acc_plus", 0.652, _BASE),
    PublishedScore("GPT-5.2 (writes verdicts)", _VL, "overall", 0.702, _DT2IT),
    PublishedScore("GPT-5.2 (writes verdicts)", _MM, "overall", 0.753, _DT2IT),
    PublishedScore("GPT-5.2 (writes verdicts)", _MMRLHF, "acc", 0.682, _DT2IT),
)


def published_scores(benchmark: str, metric: str | None = None) -> list[PublishedScore]:
    """
    What was published about a benchmark.

    Args:
        benchmark (`str`):
            Name of the benchmark, or `"pooled"`.
        metric (`str`, *optional*):
            Only this metric.

    Returns:
        `list[PublishedScore]`: the best first.
    """
    found = [one for one in PUBLISHED if one.benchmark == benchmark and metric in (None, one.metric)]
    return sorted(found, key=lambda one: -one.value)
