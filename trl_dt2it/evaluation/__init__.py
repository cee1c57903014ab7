"""Reward models on benchmarks of preference pairs: the metrics, how sure they are, and beside what was published."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


_MODULES = {
    "BENCHMARKS": "benchmarks",
    "PUBLISHED": "published",
    "EvalResult": "result",
    "PooledResult": "result",
    "PublishedScore": "published",
    "ScoreFile": "scores_file",
    "compute_metrics": "metrics",
    "eval_datasets": "reading",
    "evaluate": "evaluating",
    "pooled": "result",
    "published_scores": "published",
    "read_benchmark": "reading",
    "show_published": "result",
    "split_predictions": "scores_file",
    "training_metrics": "training",
    "write_scores": "scores_file",
}

__all__ = [
    "BENCHMARKS",
    "PUBLISHED",
    "EvalResult",
    "PooledResult",
    "PublishedScore",
    "ScoreFile",
    "compute_metrics",
    "eval_datasets",
    "evaluate",
    "pooled",
    "published_scores",
    "read_benchmark",
    "show_published",
    "split_predictions",
    "training_metrics",
    "write_scores",
]

if TYPE_CHECKING:
    from .benchmarks import BENCHMARKS
    from .evaluating import evaluate
    from .metrics import compute_metrics
    from .published import PUBLISHED, PublishedScore, published_scores
    from .reading import eval_datasets, read_benchmark
    from .result import EvalResult, PooledResult, pooled, show_published
    from .scores_file import ScoreFile, split_predictions, write_scores
    from .training import training_metrics

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
