"""Rows of the digits laboratory as a configuration file asks for them: read-outs, or questions about two images."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets import Dataset

from ..data.t2i import reformulate_t2i
from ..data.t2i_templates import ENGLISH
from .digits import make_digits, make_digits_t2i


def texts_of(specs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """
    What the tiny model's tokenizer must know besides the texts of the read-outs.

    Args:
        specs (`Mapping`):
            For each set its sources, as in [`~trl_dt2it.curation.rounds.config.read_sets`].

    Returns:
        `list[str]`: the wordings of two-image questions, if there are such.
    """
    if not any("digits_t2i" in (spec or {}) for sources in specs.values() for spec in sources.values()):
        return []
    return two_image_texts()


def two_image_texts() -> list[str]:
    """The wordings of questions about two images."""
    return [text for t in ENGLISH for text in (t.prompt, t.first_is_better, t.second_is_better, *t.labels)]


def demo_rows(kind: str, source: str, options: Mapping[str, Any]) -> Dataset:
    """
    Canonical rows.

    Args:
        kind (`str`):
            `"digits"` for [`make_digits`], or `"digits_t2i"` for [`make_digits_t2i`], reformulated.
        source (`str`):
            Their `source`.
        options (`Mapping`):
            Arguments of these, `split` (`"train"` by default) and `num_pairs` (1,000) included; for two images, also
            `both_orders` of [`~trl_dt2it.data.reformulate_t2i`].

    Returns:
        `Dataset`
    """
    given = {"source": source, **options}
    split, num_pairs = given.pop("split", "train"), given.pop("num_pairs", 1000)
    if kind == "digits":
        return make_digits(split, num_pairs, **given)
    both_orders = given.pop("both_orders", False)
    pairs = make_digits_t2i(split, num_pairs, **given)
    return reformulate_t2i(pairs, seed=given.get("seed", 42), both_orders=both_orders)


# For [`~trl_dt2it.curation.rounds.config.read_sets`].
DEMO_LOADERS = {kind: partial(demo_rows, kind) for kind in ("digits", "digits_t2i")}
