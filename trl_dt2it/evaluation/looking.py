"""Looking tests: how far the verdicts of a reward model depend on the image that it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import numpy as np
from datasets import Dataset
from rich.console import Console

from ..data.columns import as_python, column_names, column_of, has_transform, leave_images_encoded
from ..data.contents import pair_ids
from ..data.controls import DONOR_COLUMN, MEDIA, blank, low_resolution, swapped
from ..data.images import ImageOptions
from ..data.rows import named_errors, row_images, row_videos
from ..utils import screen_table
from .benchmarks.benchmark import pair_ratio
from .metrics import Interval, Tally, bootstrap_intervals, paired_interval


LOOKING = "Does it look at the image?"  # the head of tables and sections
COLUMNS = ("image shown", "accuracy, %", "95 % interval", "own gains", "95 % interval", "changed, %")

OWN = "image"
# Images shown by what they are called in results, with their names in tables.
SHOWN = {
    OWN: "its own",
    "blank": "blank",
    "swapped": "another row's",
    "half": "1/2 the pixels",
    "quarter": "1/4 the pixels",
}
# Controls by their names in arguments, with what they show.
CONTROLS: dict[str, tuple[str, ...]] = {
    "blank": ("blank",),
    "swapped": ("swapped",),
    "low_resolution": ("half", "quarter"),
}
LITTLE = 0.05  # of accuracy: a model that certainly loses less with another row's image does not look

NOTE = (
    "Its own image gains points of accuracy over the image shown, pair by pair, and a share of verdicts changes. A "
    "verdict needs the image if it is right with its own, and wrong or a tie with the blank one or with another row's."
)


@dataclass(frozen=True)
class LookingReport:
    """
    Result of looking tests, over the pairs with images alone.

    Parameters:
        verdict (`str`, *optional*):
            `"looks"` if the 95 % interval of `gain["swapped"]` is above 0; `"misled"` if it is below 0; else
            `"does not look"` if it ends below 0.05, and `"cannot tell"`. `None` without the control `swapped`.
        text (`str`):
            The verdict and the share of pairs that need the image, in one or two sentences.
        n, num_prompts (`int`):
            Number of pairs, and of their prompts, which are the independent units of all intervals.
        text_only, alone (`int`):
            Number of other pairs: without images, or, with the control `swapped`, without another row that has as
            many other images.
        metrics, bootstrap (`dict[str, dict[str, float]]` and `dict[str, dict[str, Interval]]`):
            By the image shown (`image`, `blank`, `swapped`, `half`, `quarter`), the metrics of the benchmark and their
            95 % intervals, as in [`EvalResult`].
        gain, gain_interval (`dict[str, float]` and `dict[str, Interval]`):
            For each image but its own, accuracy over pairs with its own less that with the other, from -1 to 1, and
            its paired 95 % interval.
        changed (`dict[str, float]`):
            For each image but its own, share of pairs of which another answer is preferred, or none.
        needs_image, needs_image_interval (`float` and `Interval`, *optional*):
            Share of pairs that are right with their own image, and not right with the blank one or not with another
            row's, as far as these were shown; and its 95 % interval. Without an image, a verdict is right by chance
            half of the time: a model that goes by the image alone and is always right has 1/2 by one of the two
            controls, and 3/4 by both.
    """

    verdict: str | None
    text: str
    n: int
    num_prompts: int
    text_only: int
    alone: int
    metrics: dict[str, dict[str, float]]
    bootstrap: dict[str, dict[str, Interval]]
    gain: dict[str, float]
    gain_interval: dict[str, Interval]
    changed: dict[str, float]
    needs_image: float | None = None
    needs_image_interval: Interval | None = None

    @property
    def accuracy(self) -> dict[str, tuple[float, Interval]]:
        """The accuracy over pairs and its interval, by the image shown."""
        headline = next(iter(self.metrics[OWN]))
        return {shown: (values[headline], self.bootstrap[shown][headline]) for shown, values in self.metrics.items()}

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """For each image shown, as text, the columns `COLUMNS`."""
        rows = list[tuple[str, ...]]()
        for shown, (value, interval) in self.accuracy.items():
            compared = ("", "", "")
            if shown != OWN:
                gain, ends, changed = self.gain[shown], self.gain_interval[shown], self.changed[shown]
                compared = (f"{100 * gain:+.1f}", _points(ends), f"{100 * changed:.1f}")
            rows.append((SHOWN[shown], f"{100 * value:.1f}", _points(interval), *compared))
        return rows

    @property
    def counted(self) -> str:
        """The number of pairs, and of those that were dropped."""
        dropped = [f"{self.text_only:,} without images"] * bool(self.text_only)
        dropped += [f"{self.alone:,} for which no other row has as many other images"] * bool(self.alone)
        counted = f"{self.n:,} pairs with images of {self.num_prompts:,} prompts"
        return f"{counted}; dropped: {', '.join(dropped)}." if dropped else f"{counted}."

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values, intervals as lists."""
        return json.loads(json.dumps(asdict(self)))

    def show(self, console: Console | None = None) -> None:
        """Print the report, on standard output by default."""
        console = console or Console()
        console.print(screen_table(COLUMNS, self.cells, title=LOOKING))
        for line in filter(None, (self.text, self.counted, NOTE)):
            console.print(line, markup=False)


def _points(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def shown_by(controls: Sequence[str]) -> list[str]:
    """Check the names of controls, and list the images that they show besides a row's own."""
    names = dict.fromkeys([controls] if isinstance(controls, str) else controls)
    if unknown := [name for name in names if name not in CONTROLS]:
        raise ValueError(f"`controls` has {unknown[0]!r}; pass some of {', '.join(map(repr, CONTROLS))}.")
    return [shown for name in CONTROLS if name in names for shown in CONTROLS[name]]


@dataclass(frozen=True)
class ControlSets:
    """The rows of a set that have images, with other images: M of N rows."""

    rows: np.ndarray  # (M,), positions in the set, in the order of the names of their pairs
    sets: dict[str, Dataset]  # of the M rows, with `pair_id`, by the image shown
    text_only: int
    alone: int


def make_controls(
    dataset: Dataset, shown: Sequence[str], *, title: str, image_options: ImageOptions | None = None, seed: int = 0
) -> ControlSets:
    """Make a control for each kind of image shown; images are made when rows are read."""
    has_media = _has_media(dataset)
    if not has_media.any():
        raise ValueError(f"None of the {len(dataset)} rows of {title} has an image; evaluate them without `controls`.")
    names = np.array(pair_ids(dataset).to_pylist(), dtype=object)
    # Another order of the rows then draws the same partners.
    rows = np.flatnonzero(has_media)
    rows = rows[np.argsort(names[rows], kind="stable")]
    text_only, alone = len(dataset) - len(rows), 0
    sets: dict[str, Dataset] = {}
    if "swapped" in shown:
        drawn = swapped(dataset.select(rows), seed=seed)
        others = np.flatnonzero(column_of(drawn, DONOR_COLUMN).is_valid())
        sets["swapped"], rows, alone = drawn.select(others), rows[others], len(rows) - len(others)
    some = dataset.select(rows)
    others_made: dict[str, Callable[..., Dataset]] = {
        "blank": blank,
        "half": partial(low_resolution, pixels=0.5),
        "quarter": partial(low_resolution, pixels=0.25),
    }
    sets |= {name: make(some, image_options=image_options) for name, make in others_made.items() if name in shown}
    return ControlSets(rows, {name: sets[name] for name in shown}, text_only, alone)


def _has_media(dataset: Dataset) -> np.ndarray:
    """Tell which rows have an image or a video. Shapes: returns `(N,)`."""
    dataset = cast(Dataset, leave_images_encoded(as_python(dataset)))
    media = [name for name in MEDIA if name in column_names(dataset)]
    if not media:
        return np.zeros(len(dataset), dtype=bool)
    found = []
    for index, row in enumerate(dataset if has_transform(dataset) else dataset.select_columns(media)):
        with named_errors(row, index):
            found.append(bool(row_images(row) or row_videos(row)))
    return np.array(found, dtype=bool)


def compare(
    controls: ControlSets,
    scores: Mapping[str, np.ndarray],
    unit: np.ndarray,
    count: Callable[[np.ndarray, np.ndarray, np.ndarray], Tally],
    *,
    num_resamples: int,
    seed: int,
) -> LookingReport:
    """Compare the M rows of controls, of N rows of a set. Shapes: `scores` `(M, 2)` by the image shown, `unit` `(N,)`,
    the prompt of each row; `count` tallies rows `(M,)` by their prompts `(M,)` from 0 on, and scores `(M, 2)`."""
    options: Any = {"num_resamples": num_resamples, "seed": seed}
    unit = np.unique(unit[controls.rows], return_inverse=True)[1]
    tallies = {shown: count(controls.rows, unit, values) for shown, values in scores.items()}
    preferred = {shown: np.sign(values[:, 0] - values[:, 1]) for shown, values in scores.items()}
    right = {shown: values > 0 for shown, values in preferred.items()}
    others = [shown for shown in scores if shown != OWN]
    lost = {shown: right[OWN].astype(float) - right[shown] for shown in others}
    needs: dict[str, Any] = {}
    if without := [right[shown] for shown in ("blank", "swapped") if shown in right]:
        needing = Tally({"needs": pair_ratio(right[OWN] & ~np.logical_and.reduce(without), unit)}, {}, {})
        needs["needs_image"] = needing.values()["needs"]
        needs["needs_image_interval"] = bootstrap_intervals(needing, **options)["needs"]
    gain = {shown: float(values.mean()) for shown, values in lost.items()}
    intervals = {shown: paired_interval(values, unit) for shown, values in lost.items()}
    changed = {shown: float((preferred[shown] != preferred[OWN]).mean()) for shown in others}
    verdict = _verdict(intervals["swapped"]) if "swapped" in others else None
    told = [] if verdict is None else [_tell(verdict, gain["swapped"], intervals["swapped"], changed["swapped"])]
    if needs:
        interval = _points(needs["needs_image_interval"])
        told.append(f"{100 * needs['needs_image']:.1f} % of its verdicts need the image (95 % interval {interval}).")
    return LookingReport(
        verdict=verdict,
        text=" ".join(told),
        n=len(controls.rows),
        num_prompts=int(unit.max()) + 1,
        text_only=controls.text_only,
        alone=controls.alone,
        metrics={shown: tally.values() for shown, tally in tallies.items()},
        bootstrap={shown: bootstrap_intervals(tally, **options) for shown, tally in tallies.items()},
        gain=gain,
        gain_interval=intervals,
        changed=changed,
        **needs,
    )


def _verdict(gain: Interval) -> str:
    """Judge by the interval of the accuracy that the own image gains over another row's."""
    if gain.low > 0:
        return "looks"
    if gain.high < 0:
        return "misled"
    return "does not look" if gain.high < LITTLE else "cannot tell"


def _tell(verdict: str, gain: float, interval: Interval, changed: float) -> str:
    """Say a verdict in a sentence, with what it rests on."""
    # A model at chance may look and gain nothing by it.
    start = {
        "looks": "The model looks at the image",
        "misled": "The image misleads the model",
        "does not look": "The model does not look at the image, or to no avail",
        "cannot tell": "These pairs cannot tell whether the model looks at the image",
    }[verdict]
    points = round(100 * gain, 1)
    size = f"{abs(points)} points {'lower' if points > 0 else 'higher'}" if points else "the same"
    rest = f"own less other, 95 % interval {_points(interval)}; {100 * changed:.1f} % of its verdicts change"
    return f"{start}: with another row's image its accuracy is {size} ({rest})."
