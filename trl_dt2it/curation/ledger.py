"""The ledger: one row per pair and round, append-only, from which the current set is computed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from transformers.utils import logging

from ..data.columns import column_of
from ..data.contents import CONTENT_COLUMNS, FLIPPED, pair_contents, pair_ids
from ..data.mixing import swap_pairs, with_columns
from ..data.rows import SIDES
from ..utils import check_value, file_digest, read_json, whole_file, write_json
from .corrections import read_corrections
from .noise import as_column
from .rules import Decision, is_missing_vote, label_doubt


logger = logging.get_logger(__name__)

_VERSION = 1  # of a ledger

_ACTIONS, _MANUAL = ("keep", "flip", "drop"), "manual"
_STAGE = re.compile(r"[a-z0-9][a-z0-9_-]*")

# The state of a pair that no round covers: as the source set has it.
_INITIAL = {"flipped": False, "kept": True, "strength": np.nan, "posterior": np.nan}

_SUMMARY = pa.schema(
    [
        *(("round", pa.int64()), ("stage", pa.string()), ("undone", pa.bool_()), ("source", pa.string())),
        *((name, pa.int64()) for name in ("pairs", *_ACTIONS)),
        ("mean_strength", pa.float64()),
    ]
)


Labels = Literal["hard", "soft", "weight"]

LABELS: tuple[Labels, ...] = ("hard", "soft", "weight")


class CurationLedger:
    """
    Decisions about every pair, round by round.

    Rounds are added, never changed. A round overrides earlier rounds about the same pair, and a person's decision
    (stages `"manual"`, from [`~CurationLedger.correct`]) overrides all rounds, later ones too. A round can be undone
    and redone, which is recorded. Several processes may read a ledger; only one may write.

    Args:
        directory (`str` or `os.PathLike`):
            Folder of the ledger; made if it is not there.

    Raises:
        `ValueError`: if the folder holds a ledger of another version, or a file of it is missing or changed.

    Example:

    ```python
    >>> from trl_dt2it.curation import CurationLedger, Flip, combine_scores, decide, flip_mixture, pair_contents

    >>> contents = pair_contents(dataset)
    >>> decision = decide(combine_scores(scores), [Flip(flip_mixture)])
    >>> ledger = CurationLedger("ledger")
    >>> ledger.append(1, "flip", pair_ids=contents["pair_id"], decision=decision, contents=contents)
    >>> curated = ledger.apply(dataset)
    ```
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._trusted: set[str] = set()
        for entry in self.rounds:
            self._verified(entry)

    def append(
        self,
        round: int,
        stage: str,
        *,
        pair_ids: Sequence[str] | pa.Array | pa.ChunkedArray,
        decision: Decision | None = None,
        actions: Sequence[str] | pa.Array | None = None,
        sources: Sequence[str | None] | pa.Array | pa.ChunkedArray | None = None,
        scores: npt.ArrayLike | None = None,
        models: Sequence[str] = (),
        strength: npt.ArrayLike | None = None,
        votes: npt.ArrayLike | None = None,
        settings: Mapping[str, Any] | None = None,
        orientation: Literal["current", "source"] = "current",
        source_set: str | None = None,
        contents: pa.Table | None = None,
        health: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Add the decisions of a stage of a round. Adding the same again changes nothing, so a killed run may repeat
        itself.

        Args:
            round (`int`):
                Number of the round, from 1; not below that of an earlier round that counts.
            stage (`str`):
                Name of the stage, such as `"flip"`: lower-case letters, digits, `-` and `_`.
            pair_ids (sequence of `str`, of length N):
                Names of the pairs, from [`pair_ids`].
            decision ([`Decision`], *optional*), actions (sequence of `str`, *optional*):
                Decision about the pairs, or in its place `"keep"`, `"flip"` or `"drop"` for each.
            sources (sequence of `str`, *optional*):
                Source of each pair.
            scores (`np.ndarray` of shape `(N, 2, M)`, *optional*), models (`Sequence[str]`, *optional*):
                Rewards of chosen and rejected by M models, in the orientation in which the pairs were scored, NaN for
                none; and the names of the models.
            strength (`np.ndarray` of shape `(N,)`, *optional*):
                Reward margins after the decision; by default those of the decision, or the last known.
            votes (`np.ndarray` of shape `(N, J, 2)`, *optional*):
                Votes of J judges, as in [`relabel_by_vote`].
            settings (`Mapping`, *optional*):
                Rules, thresholds, names of judges and the like; must fit into JSON.
            orientation (`str`, *optional*, defaults to `"current"`):
                Orientation that scores and flips refer to: that of [`~CurationLedger.apply`], or of the `"source"`.
            source_set (`str`, *optional*):
                Fingerprint of the source set, of which a ledger takes no other than its first.
            contents (`pa.Table`, *optional*):
                Content of the pairs, from [`pair_contents`], by which a pair that has changed since is noticed.
            health (`Mapping`, *optional*):
                How far the model can be believed, by source; must fit into JSON.

        Raises:
            `ValueError`: if an argument has a wrong shape or value, or the round has this stage with other content.
        """
        if not isinstance(round, int) or round < 1 or not _STAGE.fullmatch(stage):
            raise ValueError(
                f"Round {round!r}, stage {stage!r}: give a number from 1, and lower-case letters, digits, - and _."
            )
        if (decision is None) == (actions is None):
            raise ValueError("Pass either `decision` or `actions`.")
        if orientation not in ("current", "source"):
            raise ValueError(f'`orientation` is {orientation!r}; give "current" or "source".')
        record = self._read()
        if source_set is not None and record["source_set"] not in (None, source_set):
            raise ValueError(f"The ledger in {self.directory} belongs to another source set; use another directory.")
        standing, rounds = _standing(record), record["rounds"]
        same = next((entry for entry in standing if (entry["round"], entry["stage"]) == (round, stage)), None)
        before = [entry for entry in standing if same is None or rounds.index(entry) < rounds.index(same)]
        # A person's decision holds for every round, and so does not block an earlier one.
        latest = max((entry["round"] for entry in before if not self.is_manual(entry)), default=1)
        if round < latest:
            raise ValueError(f"Round {round} comes after round {latest}; number rounds in order, or undo the later.")

        names = as_column(pair_ids, "pair_ids").cast(pa.string())
        # A pair that has changed since an earlier round stands as it does now.
        known = _labels(names, self._state(before, contents))
        was_flipped = known["flipped"] if orientation == "current" else np.zeros(len(names), dtype=bool)
        if decision is None:
            # The last known margin is that of the present orientation.
            turn = np.where(known["flipped"] == was_flipped, 1.0, -1.0)
            reason = "decided by a person" if self.is_manual({"stage": stage}) else f"decided by {stage}"
            decision = _decision(actions, reason, known["strength"] * turn)
        columns = _decision_columns(names, decision, sources, was_flipped, strength)
        if contents is not None:
            columns |= _contents_of(names, contents)
        if scores is not None:
            columns |= _score_columns(np.asarray(scores), len(names), len(models))
        if votes is not None:
            columns |= _vote_columns(np.asarray(votes), len(names))
        table = pa.table(columns)
        about = {"models": list(models), "settings": json.loads(json.dumps(dict(settings or {})))}
        if same is not None:
            written = self.table(same)
            # Either of the two may lack the content of the pairs, or be of a release without posteriors.
            both = [name for name in written.column_names if name in table.column_names]
            others = set(written.column_names) ^ set(table.column_names)
            is_same = not others - {*CONTENT_COLUMNS, "posterior"} and written.select(both).equals(table.select(both))
            if {name: same[name] for name in about} != about or not is_same:
                raise ValueError(
                    f"The ledger in {self.directory} has another {stage!r} in round {round}; undo it first "
                    f"(`undo({round}, {stage!r})`), or use another directory."
                )
            return
        record["source_set"] = record["source_set"] or source_set
        attempt = sum((entry["round"], entry["stage"]) == (round, stage) for entry in rounds) + 1
        file = f"round-{round:05d}-{stage}{'' if attempt == 1 else f'.{attempt}'}.parquet"
        with whole_file(self.directory / file) as part:
            pq.write_table(table, part, use_dictionary=["source", "action", "reason"], compression="zstd")
            sha256 = file_digest(part)
        self._trusted.add(sha256)
        about |= {} if health is None else {"health": json.loads(json.dumps(dict(health)))}
        rounds.append({"round": round, "stage": stage, "file": file, "sha256": sha256, "pairs": len(table), **about})
        # After the table, so that `ledger.json` never names a file that is not there.
        write_json(self.directory / "ledger.json", record)

    def correct(self, actions: Mapping[str, str], *, settings: Mapping[str, Any] | None = None) -> None:
        """
        Add a person's decisions about single pairs. They override all rounds until they are undone or corrected.

        Args:
            actions (`Mapping[str, str]`):
                `"keep"`, `"flip"` or `"drop"` for each `pair_id`, seen from the present state of the pair.
            settings (`Mapping`, *optional*):
                Who, why, and the like.

        Raises:
            `ValueError`: if there is no round yet, a pair is not in the ledger, or an action is another word.
        """
        if not actions:
            raise ValueError("`actions` is empty; name at least one pair.")
        names = pa.array(list(actions), pa.string())
        unknown = names.filter(pc.invert(pc.is_in(names, value_set=self.state()["pair_id"].combine_chunks())))
        if len(unknown):
            raise ValueError(f"{len(unknown)} of {len(names)} pairs are not in the ledger, {unknown[0]} the first.")
        latest = max(entry["round"] for entry in self.standing)
        earlier = sum(entry["round"] == latest and self.is_manual(entry) for entry in self.rounds)
        # The person has seen the pairs as the last round recorded them.
        contents = self._last_contents(names)
        self.append(
            latest,
            _MANUAL if earlier == 0 else f"{_MANUAL}-{earlier + 1}",
            pair_ids=names,
            actions=list(actions.values()),
            settings=settings,
            contents=contents if any(contents[name].null_count < len(names) for name in CONTENT_COLUMNS) else None,
        )

    def correct_from(self, path: str | os.PathLike) -> dict[str, int]:
        """
        Add a person's decisions from the file that a report exports.

        Returns:
            `dict[str, int]`: number of pairs to `keep` as they stand, to `flip` and to `drop` from now on; of those
            about which a person had decided the same `before`; and of the `unsure`, which are not recorded.

        Raises:
            `ValueError`: as [`~CurationLedger.correct`], or if the file is wrong or of another source set.
        """
        (source_set, wanted, unsure), state, own = read_corrections(path), self.state(), self.source_set
        if source_set != own and None not in (source_set, own):
            raise ValueError(f"{path} is of another source set than the ledger in {self.directory}; take its own.")
        counts = {**dict.fromkeys((*_ACTIONS, "before"), 0), "unsure": len(unsure)}
        names = pa.array(list(wanted), pa.string())
        present = state.take(pc.index_in(names, value_set=state["pair_id"].combine_chunks())).to_pylist()
        actions: dict[str, str] = {}
        for (name, (flip, keep)), now in zip(wanted.items(), present, strict=True):
            is_same_side = now["flipped"] in (None, flip)  # `None` of a pair that is not in the ledger
            # The orientation of a dropped pair makes no difference.
            if now["stage"] and self.is_manual(now) and now["kept"] == keep and (is_same_side or not keep):
                counts["before"] += 1
                continue
            actions[name] = "drop" if not keep else "keep" if is_same_side else "flip"
            counts[actions[name]] += 1
        if actions:
            self.correct(actions, settings={"file": Path(path).name})
        return counts

    def state(self, after: int | None = None, *, contents: pa.Table | None = None) -> pa.Table:
        """
        Compute the state of every pair in the ledger, without undone rounds.

        Args:
            after (`int`, *optional*):
                Last round that counts; 0 stands for the source set, and returns no row.
            contents (`pa.Table`, *optional*):
                Content of the pairs now, from [`pair_contents`]: decisions about other content then do not count.

        Returns:
            `pa.Table`: `pair_id`; `flipped`, against the source set; `kept`; `strength`, null if unknown; `posterior`,
            the probability that the label of the source set is wrong, null if the last decision does not say; `round`
            and `stage` of the last decision, 0 and `""` if none counts; and with `contents` `changed`, true where the
            last decision is about other content.
        """
        return self._state([entry for entry in self.standing if after is None or entry["round"] <= after], contents)

    def labels(
        self, names: pa.Array, after: int | None = None, *, contents: pa.Table | None = None
    ) -> dict[str, np.ndarray]:
        """
        Look up the state of N pairs by their names, in the ledger or not, as in [`~CurationLedger.state`].

        Returns:
            `dict[str, np.ndarray]`: `flipped`, `kept`, `strength`, `posterior`, `is_known` and `has_changed`, each of
            shape `(N,)`. Unknown pairs are not flipped and kept, and their strength and posterior are NaN.
        """
        return _labels(names, self.state(after, contents=contents))

    def apply(
        self,
        dataset: Dataset,
        *,
        after: int | None = None,
        refresh_strength: bool = False,
        labels: Labels = "hard",
        num_proc: int | None = None,
        contents: pa.Table | None = None,
    ) -> Dataset:
        """
        Make the curated set: flipped pairs with their answers swapped, without the dropped pairs.

        Every column with `chosen` in its name changes places with its `rejected` partner; images are neither decoded
        nor copied. The new columns `pair_id`, the names of the source set, and `curation_flipped`, a mark of flipped
        rows, let a ledger be applied again, and a later ledger to a curated set.

        Pairs whose prompt, answers or images have changed since they were decided about (edited, or swapped without
        that column) stay as they are, with a warning, unless another round is about their present content.

        Args:
            dataset (`Dataset`):
                The source set, some of its rows, or an earlier result.
            after (`int`, *optional*):
                Last round that counts.
            refresh_strength (`bool`, *optional*, defaults to `False`):
                Whether the column `strength` takes the reward margins of the ledger where it has any, at least 0.
            labels (`str`, *optional*, defaults to `"hard"`):
                What becomes of doubt about labels, where a rule says how probable a wrong one is: `"hard"`: nothing.
                `"soft"`: the column `label_confidence` is the probability that the label is right, at least 0.5, so
                that a training learns its expectation. `"weight"`: the column `weight` is multiplied by twice that
                minus 1, so that a label that may as well be wrong is not learned.
            num_proc (`int`, *optional*):
                Number of processes that name and hash rows.
            contents (`pa.Table`, *optional*):
                From [`pair_contents`], by default with paths of images relative to the working directory.

        Returns:
            `Dataset`: rows in their order. Pairs that are not in the ledger stay as they are.

        Raises:
            `ValueError`: if none of the rows is in the ledger.
        """
        if contents is None:
            contents = pair_contents(dataset, num_proc=num_proc)
            names = contents["pair_id"].combine_chunks()
        else:  # they may be of more rows than these
            names = pair_ids(dataset, num_proc=num_proc)
        state = self.state(after, contents=contents)
        known = _labels(names, state)
        is_known, changed = known["is_known"], np.flatnonzero(known["has_changed"])
        if len(state) and len(names) and not is_known.any() and not len(changed):
            raise ValueError(
                f"The ledger speaks of {len(state):,} pairs and of none of these {len(names):,} rows, "
                f"{names[0].as_py()!r} the first; apply it to the set that was scored."
            )
        if len(changed):
            logger.warning(
                f"{len(changed):,} of {len(names):,} pairs, {names[int(changed[0])].as_py()!r} the first, have "
                "another prompt, other answers (edited or swapped) or other images than when the ledger decided about "
                "them; this is not applied to them. Put the rows back, or decide anew: score them and append a round."
            )
        is_swapped = np.zeros(len(dataset), dtype=bool)
        if FLIPPED in dataset.column_names:
            is_swapped = column_of(dataset, FLIPPED).fill_null(False).to_numpy(zero_copy_only=False)
        flipped = np.where(is_known, known["flipped"], is_swapped)
        columns = {"pair_id": names, FLIPPED: pa.array(flipped)}
        if refresh_strength:
            own = np.full(len(dataset), np.nan)
            if "strength" in dataset.column_names:
                own = column_of(dataset, "strength").cast(pa.float64()).to_numpy(zero_copy_only=False)
            new = np.maximum(known["strength"], 0.0)
            columns["strength"] = pa.array(np.where(np.isnan(new), own, new), from_pandas=True)
        if labels != "hard":
            check_value("`labels`", labels, labels in LABELS, f"give one of {', '.join(LABELS)}")
            doubt = label_doubt(known["posterior"], flipped)
            if labels == "weight" and FLIPPED in dataset.column_names:
                raise ValueError('The set is an earlier result; apply `labels="weight"` to the source set, and once.')
            name = "label_confidence" if labels == "soft" else "weight"
            own = np.full(len(dataset), np.nan)
            if name in dataset.column_names:
                own = column_of(dataset, name).cast(pa.float64()).to_numpy(zero_copy_only=False)
            new = 1 - doubt if labels == "soft" else np.nan_to_num(own, nan=1.0) * (1 - 2 * doubt)
            # Null, or as it was, where nothing is known.
            columns[name] = pa.array(np.where(np.isnan(new), own, new), from_pandas=True)
        rows = np.flatnonzero(known["kept"])
        logger.info(
            f"Of {len(dataset):,} pairs, the ledger speaks of {is_known.sum():,}, flips {flipped[rows].sum():,} and "
            f"drops {len(dataset) - len(rows):,}."
        )
        some = rows if len(rows) < len(dataset) else None
        return swap_pairs(with_columns(dataset, columns), flipped != is_swapped, some)

    def history(self, pair_id: str) -> list[dict[str, Any]]:
        """
        List all decisions about a pair.

        Returns:
            `list[dict]`: for each round that covers the pair, in order: `round`, `stage`, `undone`, `source`,
            `action`, `reason`, `was_flipped`, `flipped`, `strength`, `scores` (for each model the rewards of chosen
            and rejected, in the orientation of then) and `votes` (for each judge, with and without position swap).
        """
        history = []
        for about, entry in self._entries():
            for row in pq.read_table(self._verified(entry), filters=[("pair_id", "==", pair_id)]).to_pylist():
                models = entry["models"] if "chosen_0" in row else []
                judges = sum(name.startswith("vote_") for name in row) // 2
                about |= {name: value for name, value in row.items() if not re.fullmatch(r".*_\d+", name)}
                about["scores"] = {name: (row[f"chosen_{i}"], row[f"rejected_{i}"]) for i, name in enumerate(models)}
                about["votes"] = [(row[f"vote_{judge}_0"], row[f"vote_{judge}_1"]) for judge in range(judges)]
                history.append(about)
        return history

    def summary(self) -> pa.Table:
        """
        Count the decisions of each round about each source.

        Returns:
            `pa.Table`: `round`, `stage`, `undone`, `source`; the numbers of `pairs`, and of those to `keep`, `flip`
            and `drop`; and their `mean_strength`.
        """
        rows: list[dict[str, Any]] = []
        for about, entry in self._entries():
            table = self.table(entry, ["source", "action", "strength"])
            action = table["action"].cast(pa.string())
            columns = {"source": table["source"].cast(pa.string()), "strength": table["strength"]}
            columns |= {name: pc.equal(action, name).cast(pa.int64()) for name in _ACTIONS}
            counts = pa.table(columns).group_by("source", use_threads=False)
            counts = counts.aggregate([([], "count_all"), *((name, "sum") for name in _ACTIONS), ("strength", "mean")])
            rows += [about | row for row in counts.rename_columns(_SUMMARY.names[len(about) :]).to_pylist()]
        return pa.Table.from_pylist(rows, schema=_SUMMARY)

    def _entries(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return `round`, `stage` and `undone` of each round, and its entry in `ledger.json`."""
        record = self._read()
        standing = _standing(record)
        return [
            ({"round": entry["round"], "stage": entry["stage"], "undone": entry not in standing}, entry)
            for entry in record["rounds"]
        ]

    def diff(self, round_a: int, round_b: int) -> pa.Table:
        """
        Find the pairs whose state after one round differs from that after another, where 0 is the source set: a table
        of `pair_id`, `flipped_a`, `kept_a`, `flipped_b` and `kept_b`.
        """
        states = {"a": self.state(round_a), "b": self.state(round_b)}
        names = pa.concat_arrays([state["pair_id"].combine_chunks() for state in states.values()]).unique()
        columns: dict[str, np.ndarray] = {}
        for side, state in states.items():
            known = _labels(names, state)
            columns |= {f"{name}_{side}": known[name] for name in ("flipped", "kept")}
        differs = (columns["flipped_a"] != columns["flipped_b"]) | (columns["kept_a"] != columns["kept_b"])
        return pa.table({"pair_id": names, **columns}).filter(pa.array(differs))

    def undo(self, round: int, stage: str | None = None) -> None:
        """Undo a round, or one stage of it, which stays recorded; raise a `ValueError` if nothing of it counts."""
        self._record_event("undo", round, stage)

    def redo(self, round: int, stage: str | None = None) -> None:
        """Undo an undo; raise a `ValueError` if nothing of the round is undone, or another in its place counts."""
        self._record_event("redo", round, stage)

    def _record_event(self, kind: Literal["undo", "redo"], round: int, stage: str | None) -> None:
        record = self._read()
        standing = _standing(record)
        meant = [
            entry
            for entry in record["rounds"]
            if entry["round"] == round and stage in (None, entry["stage"]) and (entry in standing) == (kind == "undo")
        ]
        if kind == "redo":  # of several attempts the last, unless another counts
            taken = {entry["stage"] for entry in standing if entry["round"] == round}
            latest = {entry["stage"]: entry for entry in meant}
            meant = [entry for name, entry in latest.items() if name not in taken]
        if not meant:
            what = f"round {round}" + ("" if stage is None else f", stage {stage!r}")
            state = "stands" if kind == "undo" else "is undone"
            raise ValueError(f"Nothing of {what} {state}, so there is no {kind}.")
        record["events"].append({kind: [entry["file"] for entry in meant]})
        write_json(self.directory / "ledger.json", record)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """All rounds in order, undone ones too: `round`, `stage`, `file`, `sha256`, `pairs`, `models`, `settings`."""
        return self._read()["rounds"]

    @property
    def standing(self) -> list[dict[str, Any]]:
        """The rounds that count, as in `rounds`, those of persons last."""
        return _standing(self._read())

    @property
    def source_set(self) -> str | None:
        """Fingerprint of the source set; `None` if the ledger does not know it."""
        return self._read()["source_set"]

    @staticmethod
    def is_manual(entry: Mapping[str, Any]) -> bool:
        """Tell a round of `rounds` in which a person decided."""
        return entry["stage"] == _MANUAL or entry["stage"].startswith(f"{_MANUAL}-")

    def table(self, entry: Mapping[str, Any], columns: Sequence[str] | None = None) -> pa.Table:
        """
        Read the decisions of a round, an entry of `rounds`, or some columns of them.

        Returns:
            `pa.Table`: `pair_id`, `source`, `was_flipped`, `flipped`, `action`, `reason` and `strength`; and where the
            round has them `posterior`, the probability that the label as of `was_flipped` is wrong, null if unknown;
            `chosen_0`, `rejected_0`, ... for each model; and `vote_0_0`, `vote_0_1`, ... for each judge, with and
            without position swap.
        """
        return pq.read_table(self._verified(entry), columns=None if columns is None else list(columns))

    def files(self) -> list[tuple[str, bytes]]:
        """Read name and content of each file of the ledger, as they are at one moment."""
        record = self._read()
        tables = [(entry["file"], self._verified(entry).read_bytes()) for entry in record["rounds"]]
        return [("ledger.json", (json.dumps(record, indent=2) + "\n").encode()), *tables]

    def _read(self) -> dict[str, Any]:
        """Read `ledger.json`, anew each time: another process may have written meanwhile."""
        path = self.directory / "ledger.json"
        record = read_json(path)
        if record is None:
            return {"version": _VERSION, "source_set": None, "rounds": [], "events": []}
        if record.get("version") != _VERSION:
            raise ValueError(f"{path} has version {record.get('version')!r}; this release reads version {_VERSION}.")
        return record

    def _verified(self, entry: Mapping[str, Any]) -> Path:
        """Return the file of a round, whose hash is checked once."""
        path = self.directory / entry["file"]
        if not path.is_file():
            raise ValueError(f"{path} is missing, and the ledger needs it; put it back from a copy.")
        if entry["sha256"] not in self._trusted:
            if file_digest(path) != entry["sha256"]:
                raise ValueError(f"{path} is not what the ledger wrote; put it back from a copy.")
            self._trusted.add(entry["sha256"])
        return path

    def _state(self, entries: Sequence[Mapping[str, Any]], contents: pa.Table | None) -> pa.Table:
        """Merge rounds, later overriding earlier, into the table of [`~CurationLedger.state`]."""
        initial = {**_INITIAL, "entry": -1, "changed": False}
        known = pa.array([], pa.string())
        values = {name: np.empty(0, dtype=np.asarray(value).dtype) for name, value in initial.items()}
        for number, entry in enumerate(entries):
            has_contents = contents is not None and self._has_contents(entry)
            if contents is not None and not has_contents:
                logger.warning_once(
                    f"{self.directory} does not know what was in the pairs that {entry['file']} decided about (of an "
                    "earlier release, or written without `contents`): that rows changed since then goes unnoticed."
                )
            columns = ["pair_id", "flipped", "action", "strength"]
            columns += ["posterior", "was_flipped"] if "posterior" in self._columns(entry) else []
            table = self.table(entry, [*columns, *(CONTENT_COLUMNS if has_contents else ())])
            names = table["pair_id"].combine_chunks()
            positions, is_new = _find(names, known)
            if is_new.any():
                positions[is_new] = len(known) + np.arange(is_new.sum())
                known = pa.concat_arrays([known, names.filter(pa.array(is_new))])
                values = {name: np.r_[value, np.full(is_new.sum(), initial[name])] for name, value in values.items()}
            changed = np.zeros(len(names), dtype=bool)
            if has_contents:
                now = _contents_of(names, contents)
                # Null where either is; where an image could not be read, the texts decide.
                differs = [pc.not_equal(table[name], now[name]) for name in CONTENT_COLUMNS]
                changed = pc.fill_null(pc.coalesce(*differs), False).to_numpy()
            values["changed"][positions] = changed
            positions, table = positions[~changed], table.filter(pa.array(~changed))
            values["flipped"][positions] = table["flipped"].to_numpy()
            values["kept"][positions] = pc.not_equal(table["action"].cast(pa.string()), "drop").to_numpy()
            values["strength"][positions] = table["strength"].to_numpy()
            values["posterior"][positions] = _source_posterior(table)
            values["entry"][positions] = number
        # Entry -1, of which nothing counts, takes the last value.
        rounds = np.array([*(entry["round"] for entry in entries), 0], dtype=np.int32)
        stages = np.array([*(entry["stage"] for entry in entries), ""], dtype=object)
        last, changed = values.pop("entry"), values.pop("changed")
        done = {"pair_id": known} | {name: pa.array(value, from_pandas=True) for name, value in values.items()}
        done |= {"round": pa.array(rounds[last]), "stage": pa.array(stages[last], pa.string())}
        return pa.table(done if contents is None else {**done, "changed": changed})

    def _has_contents(self, entry: Mapping[str, Any]) -> bool:
        return set(CONTENT_COLUMNS) <= self._columns(entry)

    def _columns(self, entry: Mapping[str, Any]) -> set[str]:
        return set(pq.read_schema(self._verified(entry)).names)

    def _last_contents(self, names: pa.Array) -> pa.Table:
        """Return what [`pair_contents`] did for pairs, by the last round that knows, undone rounds too."""
        columns = ("pair_id", *CONTENT_COLUMNS)
        last = {name: {"pair_id": name} for name in names.to_pylist()}
        for entry in filter(self._has_contents, self.rounds):
            table = self.table(entry, columns)
            rows = table.filter(pc.is_in(table["pair_id"], value_set=names)).to_pylist()
            last |= {row["pair_id"]: row for row in rows if any(row[name] for name in CONTENT_COLUMNS)}
        return pa.Table.from_pylist(list(last.values()), pa.schema(dict.fromkeys(columns, pa.string())))


def _standing(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rounds that count, those of persons last."""
    undone: set[str] = set()
    for event in record["events"]:
        undone = (undone | set(event.get("undo", ()))) - set(event.get("redo", ()))
    return sorted((entry for entry in record["rounds"] if entry["file"] not in undone), key=CurationLedger.is_manual)


def _source_posterior(table: pa.Table) -> np.ndarray | float:
    """Return the probability that the labels of the source set are wrong, `(N,)`; NaN of a round that does not say."""
    if "posterior" not in table.column_names:
        return math.nan
    wrong = table["posterior"].to_numpy().astype(np.float64)
    return np.where(table["was_flipped"].to_numpy(), 1 - wrong, wrong)


def _decision(actions: Any, reason: str, margins: np.ndarray) -> Decision:
    """Turn an action per pair into a decision."""
    words = as_column(actions, "actions", len(margins)).cast(pa.string())
    known = pc.index_in(words, value_set=pa.array(_ACTIONS))
    if known.null_count:
        wrong = words.filter(known.is_null())[0].as_py()
        raise ValueError(f"An action is {wrong!r}; give one of {', '.join(map(repr, _ACTIONS))}.")
    codes = known.to_numpy()
    flip = codes == 1
    zeros = np.zeros(len(codes), dtype=np.int16)
    return Decision(flip, codes != 2, np.where(flip, -margins, margins), zeros, (reason,))


def _decision_columns(
    names: pa.Array, decision: Decision, sources: Any, was_flipped: np.ndarray, strength: npt.ArrayLike | None
) -> dict[str, pa.Array]:
    """Return the columns that every round has; raise a `ValueError` if a name is missing or repeated."""
    count = len(names)
    if len(decision) != count:
        raise ValueError(f"There are {count} pairs and a decision about {len(decision)}; pass one per pair.")
    if names.null_count or (distinct := pc.count_distinct(names).as_py()) < count:
        problem = "is missing" if names.null_count else f"is there twice ({distinct} of {count} are distinct)"
        raise ValueError(f"A pair's name {problem}; take the names that `pair_ids` gives for the data set.")
    sources = pa.nulls(count) if sources is None else as_column(sources, "sources", count)
    codes = np.where(decision.keep, np.where(decision.flip, 1, 0), 2).astype(np.int8)
    margins = np.asarray(decision.strength if strength is None else strength, dtype=np.float64)
    posterior = {}
    if decision.posterior is not None:
        posterior["posterior"] = pa.array(np.asarray(decision.posterior, dtype=np.float32), from_pandas=True)
    return {
        "pair_id": names,
        "source": sources.cast(pa.string()).dictionary_encode(),
        "was_flipped": pa.array(was_flipped),
        "flipped": pa.array(was_flipped ^ decision.flip),
        "action": pa.DictionaryArray.from_arrays(codes, list(_ACTIONS)),
        "reason": pa.DictionaryArray.from_arrays(decision.reason_code, list(decision.reason_names)),
        "strength": pa.array(margins, from_pandas=True),
        **posterior,
    }


def _score_columns(scores: np.ndarray, count: int, num_models: int) -> dict[str, pa.Array]:
    scores = scores[:, :, None] if scores.ndim == 2 else scores
    if scores.shape != (count, 2, num_models):
        wanted = "it must be (pairs, 2, models), and `models` must name each"
        raise ValueError(f"`scores` has shape {scores.shape} for {count} pairs and {num_models} models; {wanted}.")
    names = ((f"{name}_{model}", side, model) for model in range(num_models) for side, name in enumerate(SIDES))
    return {name: pa.array(scores[:, side, model].copy(), from_pandas=True) for name, side, model in names}


def _vote_columns(votes: np.ndarray, count: int) -> dict[str, pa.Array]:
    if votes.ndim != 3 or votes.shape[0] != count or votes.shape[2] != 2:
        raise ValueError(f"`votes` has shape {votes.shape} for {count} pairs; it must be (pairs, judges, 2).")
    missing = is_missing_vote(votes)
    signs = np.where(missing, 0, votes).astype(np.int8)
    return {
        f"vote_{judge}_{order}": pa.array(signs[:, judge, order], mask=missing[:, judge, order])
        for judge, order in np.ndindex(votes.shape[1:])
    }


def _contents_of(names: pa.Array, contents: pa.Table) -> dict[str, pa.Array]:
    """Look up [`CONTENT_COLUMNS`] of pairs in a table of contents; null where it has none."""
    positions, is_new = _find(names, contents["pair_id"].combine_chunks())
    indices = pa.array(positions, mask=is_new)
    return {name: contents[name].combine_chunks().take(indices) for name in CONTENT_COLUMNS}


def _find(names: pa.Array, known: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the position of each name among known, distinct names, 0 where it is new, and a mask of the new names."""
    if names.equals(known):  # as from round to round; no need to hash
        return np.arange(len(names)), np.zeros(len(names), dtype=bool)
    positions = pc.index_in(names, value_set=known)
    is_new = positions.is_null().to_numpy(zero_copy_only=False)
    return positions.fill_null(0).to_numpy().astype(np.int64), is_new


def _labels(names: pa.Array, state: pa.Table) -> dict[str, np.ndarray]:
    """Look up pairs in a state, as [`CurationLedger.labels`] does."""
    positions, is_new = _find(names, state["pair_id"].combine_chunks())
    known = state.drop_columns(["pair_id", "stage"]).take(pa.array(positions, mask=is_new))
    initial = {**_INITIAL, "round": 0, "changed": False}
    columns = {name: pc.fill_null(known[name], initial[name]).to_numpy() for name in known.column_names}
    has_changed = columns.pop("changed", np.zeros(len(names), dtype=bool))
    return {"is_known": columns.pop("round") > 0, "has_changed": has_changed, **columns}
