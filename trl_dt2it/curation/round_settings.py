"""The rounds of a curation as a configuration file describes them, checked before anything is done."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from .deciding import Flip, Keep
from .noise import flip_mixture
from .rules import flip_negative, flip_weakest_half, keep_confident, keep_consistent


# What a configuration may name, with any of the function's options beside it.
FLIP_RULES = {rule.__name__: rule for rule in (flip_weakest_half, flip_negative, flip_mixture)}
KEEP_RULES = {rule.__name__: rule for rule in (keep_consistent, keep_confident)}
COMBINE = ("raw", "zscore", "rank")
TRAIN_ON = ("base", "current")
ORIENTATIONS = ("source", "current")


@dataclass(frozen=True)
class Step:
    """
    One scoring of the pool, and what is decided by it.

    Parameters:
        name (`str`, *optional*):
            Tells the steps of a round apart.
        train_on (`str`, *optional*):
            What the models that score are trained on: `"base"`, the constructed data alone, or `"current"`, these and
            the pool as it has been curated so far. By default `"base"` in the first step and `"current"` later.
        folds (`int`, *optional*):
            With `"current"`, number of parts of the pool, of which each is scored by a model that is trained on the
            others; 1 scores in sample. By default what the run says.
        rules (`Sequence[Mapping]`):
            Rules, one after the other: `{flip: NAME, by: source, ...}` or `{keep: NAME, by: source, ...}`, with the
            options of the rule.
        combine (`str`, *optional*, defaults to `"raw"`):
            How the scores of several models become one strength, as in [`combine_scores`].
        orientation (`str`, *optional*, defaults to `"source"`):
            Whether labels are judged as the `"source"` has them, anew in every round, or as they are `"current"`, so
            that what was flipped stays unless it is flipped back.
        min_kept (`float`, *optional*, defaults to `0.1`):
            Least share of each source that is kept.
        judge (`bool`, *optional*, defaults to `False`):
            Whether judges are asked about the pairs that the rules drop. Those on which they agree come back.
    """

    name: str | None = None
    train_on: str | None = None
    folds: int | None = None
    rules: Sequence[Mapping[str, Any]] = ()
    combine: str = "raw"
    orientation: str = "source"
    min_kept: float = 0.1
    judge: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("train_on", self.train_on, (None, *TRAIN_ON)),
            ("combine", self.combine, COMBINE),
            ("orientation", self.orientation, ORIENTATIONS),
        ):
            if value not in choices:
                raise ValueError(
                    f"`{name}` of a round is {value!r}; choose one of {', '.join(filter(None, choices))}."
                )
        if self.folds is not None and self.folds < 1:
            raise ValueError(f"`folds` of a round is {self.folds}; it must be at least 1.")
        if not 0 <= self.min_kept <= 1:
            raise ValueError(f"`min_kept` of a round is {self.min_kept}; it must be a share from 0 to 1.")
        if not self.rules:
            raise ValueError("A round has no `rules`; give at least one, such as {flip: flip_mixture}.")
        self.read_rules()

    def read_rules(self) -> list[Flip | Keep]:
        """The rules as [`decide`] takes them."""
        return [read_rule(rule) for rule in self.rules]

    def settings(self) -> dict[str, Any]:
        """All that a decision depends on."""
        names = ("rules", "combine", "orientation", "min_kept")
        return {name: value for name, value in asdict(self).items() if name in names}


# The paper: of what the model contradicts, the worse half is flipped; a model that is trained on the result decides
# what is consistent; judges decide on the rest. Twice.
PAPER_ROUND = [
    {"name": "flip", "rules": [{"flip": "flip_weakest_half"}], "orientation": "current", "min_kept": 0.0},
    {"name": "filter", "rules": [{"keep": "keep_consistent"}], "orientation": "current", "min_kept": 0.0},
]
# Ours: what is least certain sits a round out, and all are kept at the end.
_FLIP, _KEEP = {"flip": "flip_mixture", "by": "source"}, {"keep": "keep_confident", "share": 0.9}
METHODS: dict[str, list[dict[str, Any]]] = {
    "paper": [{"steps": PAPER_ROUND}, {"steps": PAPER_ROUND}],
    "mixture": [{"rules": [_FLIP, _KEEP]}, {"rules": [_FLIP, _KEEP]}, {"rules": [_FLIP]}],
}


def read_rule(rule: Mapping[str, Any]) -> Flip | Keep:
    """
    A rule as [`decide`] takes it.

    Args:
        rule (`Mapping`):
            `{flip: NAME, by: source, ...}` or `{keep: NAME, by: source, ...}`.

    Returns:
        [`Flip`] or [`Keep`]

    Raises:
        `ValueError`: if the rule or one of its options is not known.
    """
    options = dict(rule)
    kinds = [kind for kind in ("flip", "keep") if kind in options]
    if len(kinds) != 1:
        raise ValueError(f"The rule {dict(rule)} has to have one of the keys `flip` and `keep`.")
    kind, name = kinds[0], options.pop(kinds[0])
    own = {key: options.pop(key) for key in ("by", "min_pairs") if key in options and (kind == "flip" or key == "by")}
    known: Mapping[str, Any] = FLIP_RULES if kind == "flip" else KEEP_RULES
    if name not in known:
        raise ValueError(f"`{kind}: {name}` is no rule; choose one of {', '.join(known)}.")
    # The first parameter is the strength, and those by name alone are for arrays.
    allowed = [
        one.name
        for one in list(inspect.signature(known[name]).parameters.values())[1:]
        if one.kind != one.KEYWORD_ONLY
    ]
    if unknown := [option for option in options if option not in allowed]:
        takes = f"takes {', '.join(allowed)}" if allowed else "takes no options"
        raise ValueError(f"The rule {name} has no option `{unknown[0]}`; it {takes}.")
    function = partial(known[name], **options)
    return Flip(function, **own) if kind == "flip" else Keep(function, **own)


def read_rounds(
    method: str, rounds: Sequence[Mapping[str, Any]] | None = None, *, folds: int = 2, judge: bool = False
) -> list[list[Step]]:
    """
    The rounds of a configuration, with all defaults filled in.

    Args:
        method (`str`):
            `"paper"` or `"mixture"`: what the rounds are if none are given.
        rounds (`Sequence[Mapping]`, *optional*):
            Each either the keys of a [`Step`], or `steps`, a list of such.
        folds (`int`, *optional*, defaults to `2`):
            `folds` of the steps that do not say.
        judge (`bool`, *optional*, defaults to `False`):
            Whether there is a judge. In the rounds of a method, the last step of each round then asks it.

    Returns:
        `list[list[Step]]`: the steps of each round.

    Raises:
        `ValueError`: if a key or a name is not known, or a value is out of range.
    """
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}; choose one of {', '.join(METHODS)}.")
    if rounds is not None and not rounds:
        raise ValueError("`rounds` is empty; give at least one round, or leave it out for those of the method.")
    read: list[list[Step]] = []
    for number, given in enumerate(METHODS[method] if rounds is None else rounds, 1):
        if "steps" in given and len(given) > 1:
            raise ValueError(f"Round {number} has `steps` and other keys beside it; put these into the steps.")
        steps = [dict(one) for one in given.get("steps", [given])]
        if rounds is None and judge:
            steps[-1]["judge"] = True
        known = [field.name for field in fields(Step)]
        for place, step in enumerate(steps):
            if unknown := [key for key in step if key not in known]:
                raise ValueError(f"Round {number} has the unknown key `{unknown[0]}`; known are {', '.join(known)}.")
            step.setdefault("train_on", "current" if read or place else "base")
            step.setdefault("folds", folds)
        read.append([Step(**step) for step in steps])
        names = [step.name for step in read[-1]]
        if len(set(names)) < len(names):
            raise ValueError(f"The steps of round {number} need a `name` each, all different.")
        if any(step.judge for step in read[-1]) and not judge:
            raise ValueError(f"Round {number} has `judge: true`, but there is no `judge`; say where it is.")
    return read
