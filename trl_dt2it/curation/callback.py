"""Curation between epochs: score, decide, select anew, saved and resumed with the checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from transformers import TrainerCallback
from transformers.utils import logging

from ..data.columns import column_of, has_transform, row_groups
from ..data.contents import pair_contents, pair_ids, source_fingerprint
from ..data.mixing import swap_pairs
from ..debias.audit import audit_style
from ..processes import on_main_process, same_random_state
from ..training.pair_scoring import evaluating, score_with_trainer
from ..training.selection import STATE_FILE, Selection
from ..training.trainer import MultimodalRewardTrainer
from ..utils import check_value, digest, whole_file, write_json
from .health import (
    NO_REFERENCE,
    audited_rows,
    describe_health,
    draw_references,
    show_health,
    style_rises,
)
from .ledger import LABELS, CurationLedger, Labels
from .noise import MIN_PAIRS, combine_scores, flip_mixture, group_by_source, mean_rewards
from .publish import curation_section
from .rules import Flip, Keep, decide, keep_confident, label_doubt, parameters_of, with_reference


logger = logging.get_logger(__name__)

Scorer = Callable[[Dataset], np.ndarray]

ARRAYS_FILE = "curation_state.safetensors"
_READ = ("flipped", "kept", "strength", "confidence", "weight")  # how a selection reads its pairs
STAGE = "epoch"


class IterativeCurationCallback(TrainerCallback):
    """
    Callback that curates the train set of a [`MultimodalRewardTrainer`] between its epochs.

    After `start_epoch` epochs, and every `every` epochs from then on, all pairs are scored, dropped pairs included,
    and the rules decide anew from the labels of the data set: so a pair can come back, and nothing is flipped twice.
    Flipped pairs are then read with their answers swapped, and dropped pairs are not drawn. The number of steps stays:
    where pairs are dropped, others are seen again, and in batches planned by length (`max_tokens_per_batch`,
    `group_by_length`, `batch_rebalance`) dropped pairs keep their place with the weight 0.

    The first process decides for all. Each checkpoint holds the state, and a resumed run continues as if it had not
    been interrupted. A callback whose rules change nothing gives the same weights, bit for bit, as none, with
    accelerate's seedable sampler (the trainer's default).

    > [!WARNING]
    > A model that still guesses cannot judge labels: rounds in its first epochs turn right ones wrong, and it learns
    > them. Best train on from a reward model and let it judge before the first epoch, with `start_epoch=0`; otherwise
    > begin late. By a `reference`, [`flip_mixture`] flips nothing while the model is no better than guessing. Later
    > on, the model has seen the pairs that it scores, and the longer it learns a wrong label the better it likes it:
    > `momentum` holds on to its earlier scores, `folds` score a pair only at the end of an epoch that it was held out
    > of, and a `scorer` that never saw the pairs has no such bias.

    Example:

    ```python
    >>> from trl_dt2it.curation import IterativeCurationCallback

    >>> trainer = MultimodalRewardTrainer(model="Qwen/Qwen3-VL-2B-Instruct", train_dataset=dataset)
    >>> trainer.add_callback(IterativeCurationCallback(trainer, ledger="outputs/ledger"))
    >>> trainer.train()
    ```

    Args:
        trainer ([`MultimodalRewardTrainer`]):
            Trainer that the callback is added to.
        scorer (`Callable`, *optional*):
            Function of a data set of n pairs, labelled as in the train set, that returns their rewards, `(n, 2)` or,
            from m models, `(n, 2, m)`; called on every process, the first counts. By default the model in training.
        every (`int`, *optional*, defaults to `1`):
            Number of epochs from one round to the next.
        start_epoch (`int`, *optional*, defaults to `1`):
            Number of epochs before the first round; 0 where the model, or the `scorer`, can judge pairs already.
        rules (`Sequence` of [`Flip`] and [`Keep`], *optional*):
            As in [`decide`]. By default, flip labels that are likely wrong, and drop the least certain tenth.
        min_kept (`float`, *optional*, defaults to `0.1`):
            Least share of each source to keep, in (0, 1].
        refresh_strength (`bool`, *optional*, defaults to `False`):
            Whether the known strengths of a source are redistributed among its kept pairs, by their reward margins.
        labels (`str`, *optional*, defaults to `"hard"`):
            What training makes of doubt about a label, where a rule says how probable a wrong one is, as in
            [`CurationLedger.apply`]: `"hard"`: nothing; `"soft"`: its target is the probability that the label is
            right, in place of `label_confidence`; `"weight"`: its weight falls with doubt.
        ledger (`str` or `os.PathLike`, *optional*):
            Folder of a [`CurationLedger`] that records each round. A person's corrections in it override the rules,
            from the next epoch on.
        only_sources (`Sequence[str]`, *optional*):
            Sources to curate; pairs of others are trusted and not changed.
        reference ([`~datasets.Dataset`], *optional*):
            At least 20 pairs that are known to be right and not trained on, by whose scores in each round rules such
            as [`flip_mixture`] know how far the model can be trusted. By default, a tenth of the trusted pairs (at
            least 200 and at most 1,000, but no more than a quarter), which are then not trained on. Without either,
            a bias of the model cannot be told from noise, and little is flipped.
        combine (`str`, *optional*, defaults to `"raw"`):
            As in [`combine_scores`].
        momentum (`float`, *optional*, defaults to `0.5`):
            Weight of the average over earlier rounds in the reward margin that is decided on, in [0, 1).
        folds (`int`, *optional*):
            Number of parts of the pairs, of which each epoch holds out the next, and scores it alone at its end.

    Raises:
        `ValueError`: if an argument is out of range, or the train set is streamed or lacks a column.
    """

    def __init__(
        self,
        trainer: MultimodalRewardTrainer,
        *,
        scorer: Scorer | None = None,
        every: int = 1,
        start_epoch: int = 1,
        rules: Sequence[Flip | Keep] = (Flip(flip_mixture, by="source"), Keep(keep_confident)),
        min_kept: float = 0.1,
        refresh_strength: bool = False,
        labels: Labels = "hard",
        ledger: str | os.PathLike | None = None,
        only_sources: Sequence[str] | None = None,
        reference: Dataset | None = None,
        combine: Literal["raw", "zscore", "rank"] = "raw",
        momentum: float = 0.5,
        folds: int | None = None,
    ) -> None:
        dataset = trainer.train_dataset
        if not isinstance(dataset, Dataset) or len(dataset) == 0:
            raise ValueError("Curation between epochs needs a train set that is not streamed; load it whole.")
        if has_transform(dataset):
            raise ValueError(
                "Curation reads columns, and a transform makes its rows; apply the function with `map` instead."
            )
        check_value("`every`", every, every >= 1, "it must be at least 1")
        check_value("`start_epoch`", start_epoch, start_epoch >= 0, "it must not be negative")
        check_value("`min_kept`", min_kept, 0 < min_kept <= 1, "it must be above 0 and at most 1")
        check_value("`momentum`", momentum, 0 <= momentum < 1, "it must be at least 0 and below 1")
        check_value("`combine`", combine, combine in ("raw", "zscore", "rank"), "it must be raw, zscore or rank")
        if folds is not None:
            check_value("`folds`", folds, 2 <= folds <= len(dataset), "it must be from 2 to the number of pairs")
            told = "it must be 1 with `folds`, of which each epoch holds out the next"
            check_value("`every`", every, every == 1, told)
        if refresh_strength and "strength" not in dataset.column_names:
            raise ValueError("`refresh_strength` is set, but the train set has no column `strength`; add it.")
        takes_reference = any("reference" in parameters_of(rule) for rule in rules)
        if reference is not None:
            if len(reference) < MIN_PAIRS:
                raise ValueError(f"`reference` is {len(reference)} pairs; it must be at least {MIN_PAIRS}.")
            if not takes_reference:
                raise ValueError("`reference` is passed, but no rule takes it; use `Flip(flip_mixture)` or leave it.")
        check_value("`labels`", labels, labels in LABELS, f"give one of {', '.join(LABELS)}")
        if labels != "hard" and not any("estimates" in parameters_of(rule) for rule in rules):
            told = "but no rule says how probable a wrong label is; use `Flip(flip_mixture)`, or leave it"
            raise ValueError(f"`labels` is {labels!r}, {told}.")
        self.trainer, self.scorer, self.reference = trainer, scorer, reference
        self.every, self.start_epoch, self.folds, self.labels = every, start_epoch, folds, labels
        self.ledger = None if ledger is None else CurationLedger(ledger)
        self.state = CurationState.at_start(len(dataset))
        self.state.selection.save = self._save
        self._rules = list(rules)
        has_source = "source" in dataset.column_names
        self._source = column_of(dataset, "source") if has_source else pa.repeat("", len(dataset))
        self._raw_strength = None
        if refresh_strength:
            self._raw_strength = column_of(dataset, "strength").to_numpy(zero_copy_only=False).astype(np.float64)
        self._curated = np.arange(len(dataset))
        if only_sources is not None:
            known = self._source.unique().to_pylist()
            if missing := sorted(set(only_sources) - set(known)):
                told = f"`only_sources` names {missing[0]}, which is not in the column `source`"
                raise ValueError(f"{told}; it has {', '.join(sorted(map(str, known)))}.")
            is_curated = pc.is_in(self._source, value_set=pa.array(list(only_sources)))
            self._curated = np.flatnonzero(is_curated.to_numpy(zero_copy_only=False))
        # Trusted rows that are held out of training, because no `reference` is passed.
        self._own_reference = np.empty(0, dtype=np.int64)
        if reference is None and takes_reference:
            trusted = np.setdiff1d(np.arange(len(dataset)), self._curated)
            groups = np.unique(row_groups(dataset)[trusted], return_inverse=True)[1]
            self._own_reference = trusted[draw_references(groups)]
            if len(self._own_reference):
                self.reference = dataset.select(self._own_reference)
            else:
                logger.warning(NO_REFERENCE)
        self._fingerprint = ""
        self._contents: pa.Table | None = None  # on the first process, for the ledger
        self._settings = {
            **{"every": every, "start_epoch": start_epoch, "rules": describe(list(rules)), "min_kept": min_kept},
            **{"refresh_strength": refresh_strength, "combine": combine, "momentum": momentum, "folds": folds},
            **({} if labels == "hard" else {"labels": labels}),  # checkpoints of earlier releases have none
            "only_sources": None if only_sources is None else sorted(only_sources),
            "reference": len(self._own_reference) or None,
            **({} if reference is None else {"reference": source_fingerprint(pair_ids(reference))}),
            "scorer": None if scorer is None else getattr(scorer, "__qualname__", type(scorer).__qualname__),
        }

    @property
    def selection(self) -> Selection:
        """The pairs that an epoch reads, which the trainer takes from its first callback that selects any."""
        return self.state.selection

    def _save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        state, selection = self.state, self.state.selection
        arrays = {name: getattr(selection, name) for name in _READ}
        arrays |= {"average": state.average, "reference": state.reference}
        record = {"round": state.round, "last_epoch": state.last_epoch, "seed": selection.seed}
        with whole_file(folder / ARRAYS_FILE) as path:
            save_file({name: array for name, array in arrays.items() if array is not None}, path)
        write_json(folder / STATE_FILE, {**record, "settings": self._settings, "fingerprint": self._fingerprint})

    def model_card_section(self, trainer: MultimodalRewardTrainer) -> str | None:
        """Return the section of the model card on the decisions about the pairs."""
        return curation_section(self.ledger, trainer.state.log_history)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dataset, selection = cast(Dataset, self.trainer.train_dataset), self.state.selection
        references = None if self.reference is None else len(self.reference)

        def begin() -> tuple[str, CurationState]:
            args = self.trainer.args
            self._contents = pair_contents(dataset, image_root=args.image_root, num_proc=args.dataset_num_proc)
            parts = [source_fingerprint(self._contents["pair_id"].combine_chunks())]
            own = [column_of(dataset, name) for name in ("source", "strength") if name in dataset.column_names]
            parts += [json.dumps(column.to_pylist()) for column in (self._contents["content"], *own)]
            fingerprint = digest(parts)  # of all pairs, in their order
            rounds = [] if self.ledger is None else self.ledger.rounds
            for entry in (entry for entry in rounds if not CurationLedger.is_manual(entry)):
                if entry["stage"] != STAGE or entry["settings"] != self._settings:
                    told = f"of other settings (round {entry['round']}, stage {entry['stage']!r}); pass another"
                    where = cast(CurationLedger, self.ledger).directory
                    raise ValueError(f"The ledger in {where} holds rounds of something else, or {told}.")
            if selection.checkpoint is not None:
                return fingerprint, load_state(selection.checkpoint, self._settings, fingerprint)
            return fingerprint, CurationState.at_start(len(dataset), selection.seed, references)

        self._fingerprint, started = on_main_process(begin)
        # The sampler was made before and holds on to its selection.
        for name in (*_READ, "held_out", "seed", "epoch"):
            setattr(selection, name, getattr(started.selection, name))
        self.state = replace(started, selection=selection)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not `on_epoch_end`, which a run does not come to that resumes from a checkpoint of an epoch's last step. In a
        # run that resumes within an epoch, the state of the checkpoint is that after this epoch's round.
        epoch = int(state.epoch)
        selection = self.state.selection
        selection.epoch = epoch
        if self._is_due(epoch) and self.state.last_epoch < epoch:
            self._curate(epoch)
        elif self.ledger is not None and state.epoch == epoch:  # within an epoch, they would change its order
            selection.flipped, selection.kept, rows = on_main_process(
                partial(self._correct, selection.flipped, selection.kept)
            )
            for array, certain in ((selection.confidence, np.nan), (selection.weight, 1.0)):
                if array is not None:
                    array[rows] = certain
        selection.held_out = None
        if len(self._own_reference):
            selection.held_out = np.isin(np.arange(len(selection)), self._own_reference)
        if self.folds is not None and self._is_due(epoch + 1) and epoch + 1 < state.num_train_epochs:
            fold = self._fold_of_epoch(epoch)
            selection.held_out = fold if selection.held_out is None else fold | selection.held_out
        if not selection.drawn.any():
            raise ValueError(f"All kept pairs are in the fold that epoch {epoch} holds out; leave `folds` out.")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_main_process(self._warn_of_style)

    def _warn_of_style(self) -> None:
        """Warn where style tells more of the labels than before the curation."""
        flipped, kept = self.state.selection.flipped, self.state.selection.kept
        if not flipped.any() and kept.all():
            return
        rows = audited_rows(len(kept))
        before = cast(Dataset, self.trainer.train_dataset).select(rows)
        sets = {"before": before, "after": swap_pairs(before, flipped[rows], np.flatnonzero(kept[rows]))}
        try:
            for sentence in style_rises({when: asdict(audit_style(one)) for when, one in sets.items()}):
                logger.warning(sentence)
        except ValueError as error:  # the model is trained, and has yet to be saved
            logger.warning(f"Style is not audited after the curation: {error}")

    def _is_due(self, epoch: int) -> bool:
        return epoch >= self.start_epoch and (epoch - self.start_epoch) % self.every == 0

    def _fold_of_epoch(self, epoch: int) -> np.ndarray:
        """Mark the pairs that are held out of an epoch, `(N,)` bool."""
        folds = cast(int, self.folds)
        held_out = np.zeros(len(self.state.average), dtype=bool)
        drawn = draw_folds(len(self._curated), folds, self.state.selection.seed)
        held_out[self._curated[drawn == epoch % folds]] = True
        return held_out

    def _curate(self, epoch: int) -> None:
        rows = self._curated
        if self.folds is not None and epoch > 0:
            rows = np.flatnonzero(self._fold_of_epoch(epoch - 1))
        train = cast(Dataset, self.trainer.train_dataset)
        with same_random_state():
            scores = self._score(train if len(rows) == len(train) else train.select(rows), rows)
            reference_scores = None if self.reference is None else self._score(self.reference)
        selection, changed, metrics = on_main_process(lambda: self._decide(rows, scores, reference_scores))
        vars(self.state.selection).update(selection)
        vars(self.state).update(changed, round=self.state.round + 1, last_epoch=epoch)
        # In training, `log` would add the metrics since the last log, and begin to gather them anew.
        with evaluating(self.trainer.model):
            self.trainer.log(metrics)

    def _score(self, dataset: Dataset, rows: np.ndarray | None = None) -> np.ndarray:
        if self.scorer is not None:
            return np.asarray(self.scorer(dataset))
        batch_size = self.trainer.args.per_device_eval_batch_size
        return score_with_trainer(self.trainer, dataset, rows, batch_size=batch_size)

    def _correct(self, flipped: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Apply a person's corrections in the ledger, about the present content of pairs, to copies of the masks of
        flipped and kept pairs, `(N,)`; return these and the rows of the corrections. Only the first process calls
        it."""
        flipped, kept, rows = flipped.copy(), kept.copy(), np.empty(0, dtype=np.int64)
        if self.ledger is not None and any(map(CurationLedger.is_manual, self.ledger.standing)):
            contents = cast(pa.Table, self._contents)
            names, state = contents["pair_id"].combine_chunks(), self.ledger.state(contents=contents)
            state = state.filter(
                pa.array([CurationLedger.is_manual({"stage": one.as_py()}) for one in state["stage"]])
            )
            rows = pc.index_in(state["pair_id"].combine_chunks(), value_set=names).to_numpy()
            flipped[rows], kept[rows] = state["flipped"].to_numpy(), state["kept"].to_numpy()
        return flipped, kept, rows

    def _decide(
        self, rows: np.ndarray, scores: np.ndarray, reference_scores: np.ndarray | None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
        """Decide about all pairs scored in this round or an earlier one; return changes of the selection and of the
        state, and metrics. Only the first process calls it."""
        state, selection = self.state, self.state.selection
        _check_shape(scores, len(rows))
        every = scores
        if reference_scores is not None:
            _check_shape(reference_scores, len(cast(np.ndarray, state.reference)))
            every = np.concatenate([scores, reference_scores])  # on one scale, whichever it is
        now = combine_scores(every, self._settings["combine"])
        average, reference = state.average.copy(), state.reference
        average[rows] = blend(average[rows], now[: len(rows)], self._settings["momentum"])
        if reference is not None:
            reference = blend(reference, now[len(rows) :], self._settings["momentum"])
        scored = self._curated[~np.isnan(average[self._curated])]
        if len(scored) == 0:
            raise ValueError("The scorer gave NaN for every pair, so that there is nothing to decide on.")
        source = self._source.take(pa.array(scored))
        # Only of this round: nothing in training keeps the mean reward where it is.
        means, known_means = np.full(len(average), np.nan), mean_rewards(every)
        means[rows] = known_means[: len(rows)]
        rules = with_reference(self._rules, reference, known_means[len(rows) :])
        decision = decide(
            average[scored],
            rules,
            source=source,
            mean_reward=means[scored],
            min_kept=self._settings["min_kept"],
        )
        health = describe_health(decision.estimates, reference)
        if health is not None:
            show_health(health)
        flipped, kept, margins = selection.flipped.copy(), selection.kept.copy(), np.full(len(average), np.nan)
        flipped[scored], kept[scored], margins[scored] = decision.flip, decision.keep, decision.strength
        by_rules = flipped
        flipped, kept, by_hand = self._correct(flipped, kept)
        margins[flipped != by_rules] *= -1
        doubt = np.full(len(average), np.nan)
        if decision.posterior is not None:
            doubt[scored] = label_doubt(decision.posterior, decision.flip)
        doubt[by_hand] = np.nan  # a person does not doubt
        if self.ledger is not None:
            every_score = np.full((len(average), *scores.shape[1:]), np.nan, dtype=scores.dtype)
            every_score[rows] = scores
            names = cast(pa.Table, self._contents)["pair_id"].combine_chunks()
            models = ["in training"] if self.scorer is None else [self._settings["scorer"]]
            if self.scorer is not None and scores.ndim == 3:
                models = [f"{models[0]} {number + 1}" for number in range(scores.shape[2])]
            add_round(
                self.ledger,
                state.round + 1,
                pair_ids=names.take(pa.array(scored)),
                decision=decision,
                sources=source,
                scores=every_score[scored],
                models=models,
                settings=self._settings,
                source_set=source_fingerprint(names),
                contents=self._contents,
                health=health,
            )
        sources = {name: scored[part] for name, part in group_by_source(source, len(scored)).items()}
        changed: dict[str, Any] = {"flipped": flipped, "kept": kept, "strength": None}
        if self.labels == "soft":
            changed["confidence"] = 1 - doubt
        elif self.labels == "weight":
            changed["weight"] = np.nan_to_num(1 - 2 * doubt, nan=1.0)
        if self._raw_strength is not None:
            groups = [part[kept[part]] for part in sources.values()]
            changed["strength"] = redistribute(self._raw_strength, margins, groups)
        metrics = curation_metrics(flipped, kept, margins, scored, sources)
        return changed, {"average": average, "reference": reference}, metrics


def _check_shape(scores: np.ndarray, number: int) -> None:
    if scores.shape[:2] != (number, 2):
        told = f"an array of shape {scores.shape} for {number} pairs"
        raise ValueError(f"The scorer gave {told}; give rewards of shape ({number}, 2) or ({number}, 2, models).")


def blend(before: np.ndarray, now: np.ndarray, momentum: float) -> np.ndarray:
    """Update the exponential average of reward margins, `(N,)`; NaN on one side leaves the other."""
    average = momentum * before + (1 - momentum) * now
    return np.where(np.isnan(before), now, np.where(np.isnan(now), before, average))


def draw_folds(num_pairs: int, folds: int, seed: int) -> np.ndarray:
    """Draw the fold of each pair, `(N,)`; folds differ in size by one pair at most."""
    return np.random.default_rng([seed, num_pairs]).permutation(num_pairs) % folds


def redistribute(strength: np.ndarray, margins: np.ndarray, groups: Iterable[np.ndarray]) -> np.ndarray:
    """Redistribute strengths, `(N,)`, within groups of rows, in their own unit: the largest to the largest margin."""
    dealt = strength.copy()
    for rows in groups:
        known = rows[~np.isnan(strength[rows])]
        dealt[known[np.argsort(margins[known], kind="stable")]] = np.sort(strength[known])
    return dealt


def curation_metrics(
    flipped: np.ndarray,
    kept: np.ndarray,
    margins: np.ndarray,
    rows: np.ndarray,
    sources: Mapping[str | None, np.ndarray],
) -> dict[str, float]:
    """Compute the metrics of some rows of a curated set of N pairs, and of each source if there are several."""
    metrics: dict[str, float] = {}
    parts = {f"/{source}": part for source, part in sources.items()} if len(sources) > 1 else {}
    for end, part in {"": rows, **parts}.items():
        metrics[f"curation/kept{end}"] = int(kept[part].sum())
        metrics[f"curation/flipped{end}"] = int((flipped & kept)[part].sum())
        metrics[f"curation/dropped{end}"] = int((~kept[part]).sum())
        metrics[f"curation/noise_rate{end}"] = float(flipped[part].mean())
        known = margins[part[kept[part] & ~np.isnan(margins[part])]]
        if len(known):
            metrics[f"curation/mean_strength{end}"] = float(known.mean())
    return metrics


@dataclass
class CurationState:
    """Decisions about the N pairs of a train set."""

    selection: Selection
    average: np.ndarray  # (N,), float64: average reward margin over the rounds, as labelled in the data set, or NaN
    reference: np.ndarray | None = None  # (R,), float64: the same for the pairs known to be right
    round: int = 0  # number of rounds done
    last_epoch: int = -1  # number of epochs that were done at the last round

    @classmethod
    def at_start(cls, num_pairs: int, seed: int = 0, num_references: int | None = None) -> CurationState:
        """Return the state before any round: nothing scored, all pairs as they are in the data set."""
        reference = None if num_references is None else np.full(num_references, np.nan)
        return cls(Selection.of_all(num_pairs, seed), np.full(num_pairs, np.nan), reference)


def load_state(folder: str | os.PathLike, settings: dict[str, Any], fingerprint: str) -> CurationState:
    """Read the state of a checkpoint; refuse that of another train set or of other settings."""
    file = Path(folder) / STATE_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} was written without the curation callback; resume from it without the callback, or start anew."
        )
    record = json.loads(file.read_text(encoding="utf-8"))
    if record["fingerprint"] != fingerprint:
        raise ValueError(
            f"The curation of {folder} is that of another train set: its pairs, their content, sources, strengths or "
            "order differ; resume with the set that it was trained on, or start anew."
        )
    written = record["settings"]
    for name in sorted({*settings, *written}):
        before, now = written.get(name), settings.get(name)
        if before != now:
            told = f"`{name}` {json.dumps(before)}, which now is {json.dumps(now)}"
            raise ValueError(f"The curation of {folder} was made with {told}; set it back, or start anew.")
    arrays = load_file(Path(folder) / ARRAYS_FILE)
    selection = Selection(arrays["flipped"], arrays["kept"], seed=record["seed"])
    for name in _READ:
        setattr(selection, name, arrays.get(name))
    return CurationState(selection, arrays["average"], arrays.get("reference"), record["round"], record["last_epoch"])


def describe(value: Any) -> Any:
    """Describe a rule as JSON: its function and arguments, functions of the package by their plain names, and other
    objects than values and containers by their types."""
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else str(value)  # NaN equals nothing, not even itself
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(describe, value), key=json.dumps)
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: describe(item) for key, item in value.items()}
        return sorted(([describe(key), describe(item)] for key, item in value.items()), key=json.dumps)
    if isinstance(value, np.ndarray):
        return describe(value.tolist()) if value.dtype == object else digest(np.ascontiguousarray(value).tobytes())
    if isinstance(value, (np.bool_, np.integer)):
        return value.item()
    if isinstance(value, (bytes, bytearray)):
        return digest(value)
    if isinstance(value, os.PathLike):
        return describe(os.fspath(value))
    if isinstance(value, (Enum, np.generic)):  # dates, and floats of other sizes than Python's
        return describe(float(value)) if isinstance(value, np.floating) else str(value)
    if isinstance(value, partial):
        return [describe(value.func), describe(value.args), describe(value.keywords)]
    if is_dataclass(value) and not isinstance(value, type):
        return [describe(type(value)), {field.name: describe(getattr(value, field.name)) for field in fields(value)}]
    named = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    # No module of ours, which may move; a user's may well have a function of the same name.
    is_ours = named.__module__.startswith("trl_dt2it.")
    return named.__qualname__ if is_ours else f"{named.__module__}.{named.__qualname__}"


def add_round(ledger: CurationLedger, round: int, **content: Any) -> None:
    """Add a round of the training to its ledger; undo another round in its place, and the rounds after it."""
    try:  # to find the same round, from before the training was resumed, which other devices may not repeat
        ledger.append(round, STAGE, orientation="source", **content)
    except ValueError:
        own = (entry["round"] for entry in ledger.standing if entry["stage"] == STAGE)
        stale = sorted({number for number in own if number >= round})
        if round not in stale:
            raise
        logger.warning(f"Round {round} of the resumed training is not the one in {ledger.directory}, which is undone.")
        for number in stale:
            ledger.undo(number, STAGE)
        ledger.append(round, STAGE, orientation="source", **content)
