"""Iterative curation: find wrong labels with a reward model, decide by rules, keep a ledger, and undo at will."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


_MODULES = {
    "CurationLedger": "ledger",
    "Decision": "deciding",
    "Flip": "deciding",
    "IterativeCurationCallback": "callback",
    "Keep": "deciding",
    "NoiseEstimate": "noise",
    "combine_scores": "combining",
    "decide": "deciding",
    "estimate_noise": "noise",
    "flip_mixture": "noise",
    "flip_negative": "rules",
    "flip_weakest_half": "rules",
    "keep_confident": "rules",
    "keep_consistent": "rules",
    "pair_contents": ".data.pair_identity",
    "pair_ids": ".data.pair_identity",
    "push_curated": "publishing",
    "relabel_by_vote": "votes",
}

__all__ = [
    "CurationLedger",
    "Decision",
    "Flip",
    "IterativeCurationCallback",
    "Keep",
    "NoiseEstimate",
    "combine_scores",
    "decide",
    "estimate_noise",
    "flip_mixture",
    "flip_negative",
    "flip_weakest_half",
    "keep_confident",
    "keep_consistent",
    "pair_contents",
    "pair_ids",
    "push_curated",
    "relabel_by_vote",
]

if TYPE_CHECKING:
    from ..data.pair_identity import pair_contents, pair_ids
    from .callback import IterativeCurationCallback
    from .combining import combine_scores
    from .deciding import Decision, Flip, Keep, decide
    from .ledger import CurationLedger
    from .noise import NoiseEstimate, estimate_noise, flip_mixture
    from .publishing import push_curated
    from .rules import flip_negative, flip_weakest_half, keep_confident, keep_consistent
    from .votes import relabel_by_vote

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
