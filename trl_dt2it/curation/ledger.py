"""The ledger: one row per pair and round, append-only, from which the current set is computed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from .ledger_tables import (
    ACTIONS,
    MANUAL,
    LedgerFiles,
    as_strings,
    decision_of,
    is_manual,
    round_key,
    round_table,
    standing_rounds,
    state_of,
)
from .rules import Decision


logger = logging.get_logger(__name__)

FORMAT = "trl-dt2it corrections"

VERSION = 1

VERDICTS = ("accept", "wrong", "unsure")

_STAGE = re.compile(r"[a-z0-9][a-z0-9_-]*")

_SUMMARY = pa.schema(
    [
        *(("round", pa.int64()), ("stage", pa.string()), ("undone", pa.bool_()), ("source", pa.string())),
        *((name, pa.int64()) for name in ("pairs", *ACTIONS)),
        ("mean_strength", pa.float64()),
    ]
)


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
    >>> names = contents["pair_id"]
    >>> decision = decide(combine_scores(scores), [Flip(flip_mixture)])
    >>> ledger = CurationLedger("ledger")
    >>> ledger.append(
    ...     1, "flip", pair_ids=names, scores=scores, models=["first"], decision=decision, contents=contents
    ... )
    >>> curated = ledger.apply(dataset)
    ```
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self._files = LedgerFiles(Path(directory))
        self.directory = self._files.directory

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
            decision ([`Decision`], *optional*):
                Decision about the pairs.
            actions (sequence of `str`, *optional*):
                `"keep"`, `"flip"` or `"drop"` for each pair, in place of a decision.
            sources (sequence of `str`, *optional*):
                Source of each pair.
            scores (`np.ndarray` of shape `(N, 2, M)`, *optional*):
                Rewards of chosen and rejected, in the orientation in which the pairs were scored; NaN where there is
                none.
            models (`Sequence[str]`, *optional*):
                Names of the M models.
            strength (`np.ndarray` of shape `(N,)`, *optional*):
                Reward margins after the decision; by default those of the decision, or the last known.
            votes (`np.ndarray` of shape `(N, J, 2)`, *optional*):
                Votes of J judges with and without position swap, as in [`relabel_by_vote`].
            settings (`Mapping`, *optional*):
                Rules, thresholds, names of judges and the like; must fit into JSON.
            orientation (`str`, *optional*, defaults to `"current"`):
                Orientation in which the pairs were scored, and from which a flip counts: `"current"`, as
                [`~CurationLedger.apply`] returns them, or `"source"`, as in the source set.
            source_set (`str`, *optional*):
                Fingerprint of the source set, from [`~trl_dt2it.data.contents.source_fingerprint`]: the first is kept,
                and another one refused.
            contents (`pa.Table`, *optional*):
                Content of the pairs, from [`~trl_dt2it.curation.pair_contents`], by which [`~CurationLedger.apply`]
                notices a pair that has changed since.

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
        record = self._files.read()
        if source_set is not None and record["source_set"] not in (None, source_set):
            raise ValueError(f"The ledger in {self.directory} belongs to another source set; use another directory.")
        standing = standing_rounds(record)
        same = [number for number in standing if round_key(record["rounds"][number]) == (round, stage)]
        before = [number for number in standing if not same or number < same[0]]
        # A person's decision holds for every round, and so does not block an earlier one.
        earlier = [record["rounds"][number] for number in before]
        latest = max((entry["round"] for entry in earlier if not is_manual(entry["stage"])), default=1)
        if round < latest:
            raise ValueError(f"Round {round} comes after round {latest}; number rounds in order, or undo the later.")

        names = as_strings(pair_ids, "pair_ids")
        # A pair that has changed since an earlier round stands as it does now.
        known = state_of(names, self._files.state(record, before, contents))
        was_flipped = known["flipped"] if orientation == "current" else np.zeros(len(names), dtype=bool)
        if decision is None:
            # The last known margin is that of the present orientation.
            turn = np.where(known["flipped"] == was_flipped, 1.0, -1.0)
            reason = "decided by a person" if is_manual(stage) else f"decided by {stage}"
            decision = decision_of(actions, reason, known["strength"] * turn)
        table = round_table(
            names,
            decision,
            sources=None if sources is None else as_strings(sources, "sources", len(names)),
            was_flipped=was_flipped,
            strength=decision.strength if strength is None else np.asarray(strength),
            scores=scores,
            votes=votes,
            num_models=len(models),
            contents=contents,
        )
        about = {"models": list(models), "settings": json.loads(json.dumps(dict(settings or {})))}
        if same:
            entry = record["rounds"][same[0]]
            written = self._files.table(entry)
            # Either of the two may lack the content of the pairs.
            both = [name for name in written.column_names if name in table.column_names]
            others = set(written.column_names) ^ set(table.column_names)
            is_same = not others - set(CONTENT_COLUMNS) and written.select(both).equals(table.select(both))
            if {name: entry[name] for name in about} != about or not is_same:
                raise ValueError(
                    f"The ledger in {self.directory} has another {stage!r} in round {round}; undo it first "
                    f"(`undo({round}, {stage!r})`), or use another directory."
                )
            return
        record["source_set"] = record["source_set"] or source_set
        self._files.add(record, (round, stage), table, about)

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
        record = self._files.read()
        names = pa.array(list(actions), pa.string())
        unknown = names.filter(pc.invert(pc.is_in(names, value_set=self.state()["pair_id"].combine_chunks())))
        if len(unknown):
            raise ValueError(f"{len(unknown)} of {len(names)} pairs are not in the ledger, {unknown[0]} the first.")
        latest = max(entry["round"] for entry in self.standing)
        earlier = sum(entry["round"] == latest and is_manual(entry["stage"]) for entry in record["rounds"])
        # The person has seen the pairs as the last round recorded them.
        contents = self._files.contents(record, names)
        self.append(
            latest,
            MANUAL if earlier == 0 else f"{MANUAL}-{earlier + 1}",
            pair_ids=names,
            actions=list(actions.values()),
            settings=settings,
            contents=contents if any(contents[name].null_count < len(names) for name in CONTENT_COLUMNS) else None,
        )

    def correct_from(self, path: str | os.PathLike) -> dict[str, int]:
        """
        Add a person's decisions from the file that a report exports.

        Args:
            path (`str` or `os.PathLike`):
                The file, as in [`~trl_dt2it.curation.ledger.read_corrections`].

        Returns:
            `dict[str, int]`: number of pairs to `keep` as they stand, to `flip` and to `drop` from now on; of those
            about which a person had decided the same `before`; and of those about which the person is `unsure`, which
            are not recorded.

        Raises:
            `ValueError`: as [`~CurationLedger.correct`], or if the file is wrong or of another source set.
        """
        given, own, state = read_corrections(path), self._files.read()["source_set"], self.state()
        if given.source_set != own and None not in (given.source_set, own):
            raise ValueError(f"{path} is of another source set than the ledger in {self.directory}; take its own.")
        counts = {**dict.fromkeys((*ACTIONS, "before"), 0), "unsure": len(given.unsure)}
        names = pa.array(list(given.wanted), pa.string())
        indices = pc.index_in(names, value_set=state["pair_id"].combine_chunks()).to_pylist()
        flipped, kept, stage = (state[name].to_pylist() for name in ("flipped", "kept", "stage"))
        actions: dict[str, str] = {}
        for (name, (flip, keep)), index in zip(given.wanted.items(), indices, strict=True):
            is_same_side = index is None or flipped[index] == flip
            # The orientation of a dropped pair makes no difference.
            if index is not None and is_manual(stage[index]) and kept[index] == keep and (is_same_side or not keep):
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
                Present content of the pairs, from [`~trl_dt2it.curation.pair_contents`]. Decisions about a pair with
                other content then do not count.

        Returns:
            `pa.Table`: `pair_id`; `flipped`, against the source set; `kept`; `strength`, null if unknown; `round` and
            `stage` of the last decision, 0 and `""` if none counts; and with `contents` `changed`, true where the last
            decision is about other content.
        """
        record = self._files.read()
        numbers = standing_rounds(record)
        if after is not None:
            numbers = [number for number in numbers if record["rounds"][number]["round"] <= after]
        return self._files.state(record, numbers, contents)

    def labels(
        self, names: pa.Array, after: int | None = None, *, contents: pa.Table | None = None
    ) -> dict[str, np.ndarray]:
        """
        Look up the state of given pairs, in the ledger or not.

        Args:
            names (`pa.Array` of length N):
                Names of the pairs, from [`pair_ids`].
            after (`int`, *optional*):
                Last round that counts.
            contents (`pa.Table`, *optional*):
                Present content of the pairs, as in [`~CurationLedger.state`].

        Returns:
            `dict[str, np.ndarray]`: `flipped`, `kept`, `strength`, `is_known` and `has_changed`, each of shape `(N,)`.
            Unknown pairs are not flipped and kept, and their strength is NaN.
        """
        return state_of(names, self.state(after, contents=contents))

    def apply(
        self,
        dataset: Dataset,
        *,
        after: int | None = None,
        refresh_strength: bool = False,
        num_proc: int | None = None,
        contents: pa.Table | None = None,
    ) -> Dataset:
        """
        Make the curated set: flipped pairs with their answers swapped, without the dropped pairs.

        Every column with `chosen` in its name changes places with its `rejected` partner; images are neither decoded
        nor copied. The new column `pair_id` holds the names of the source set, and `curation_flipped` marks the
        flipped rows, so that a ledger can be applied again, and a later ledger to a curated set.

        A decision holds for the pair that it was made about. Pairs whose prompt, answers or images have changed since
        (edited, or swapped without that column) stay as they are, unless another round has decided about their present
        content; a warning tells their number and the first.

        Args:
            dataset (`Dataset`):
                The source set, some of its rows, or an earlier result.
            after (`int`, *optional*):
                Last round that counts.
            refresh_strength (`bool`, *optional*, defaults to `False`):
                Whether the column `strength` takes the reward margins of the ledger, 0 where they are negative; a pair
                without one keeps its own.
            num_proc (`int`, *optional*):
                Number of processes that name and hash rows.
            contents (`pa.Table`, *optional*):
                Content of the rows, and maybe of others, from [`~trl_dt2it.curation.pair_contents`]; by default it is
                computed, with paths of images relative to the working directory.

        Returns:
            `Dataset`: rows in their order. Pairs that are not in the ledger stay as they are.

        Raises:
            `ValueError`: if none of the rows is in the ledger.
        """
        if contents is None:
            contents = pair_contents(dataset, num_proc=num_proc)
        state, names = self.state(after, contents=contents), pair_ids(dataset, num_proc=num_proc)
        known = state_of(names, state)
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
        rows = np.flatnonzero(known["kept"])
        logger.info(
            f"Of {len(dataset):,} pairs, the ledger speaks of {is_known.sum():,}, flips {flipped[rows].sum():,} and "
            f"drops {len(dataset) - len(rows):,}."
        )
        kept_rows = rows if len(rows) < len(dataset) else None
        return swap_pairs(with_columns(dataset, columns), flipped != is_swapped, kept_rows)

    def history(self, pair_id: str) -> list[dict[str, Any]]:
        """
        List all decisions about a pair.

        Args:
            pair_id (`str`):
                Name of the pair.

        Returns:
            `list[dict]`: for each round that covers the pair, in order: `round`, `stage`, `undone`, `source`,
            `action`, `reason`, `was_flipped`, `flipped`, `strength`, `scores` (for each model the rewards of chosen
            and rejected, in the orientation of then) and `votes` (for each judge, with and without position swap).
        """
        history = []
        for about, entry in self._entries():
            for row in pq.read_table(self._files.verified(entry), filters=[("pair_id", "==", pair_id)]).to_pylist():
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
        parts = [_SUMMARY.empty_table()]
        for about, entry in self._entries():
            table = self._files.table(entry, ["source", "action", "strength"])
            action = table["action"].cast(pa.string())
            columns = {"source": table["source"].cast(pa.string()), "strength": table["strength"]}
            columns |= {name: pc.equal(action, name).cast(pa.int64()) for name in ACTIONS}
            counts = pa.table(columns).group_by("source", use_threads=False)
            counts = counts.aggregate([([], "count_all"), *((name, "sum") for name in ACTIONS), ("strength", "mean")])
            values = [pa.array([value] * len(counts)) for value in about.values()]
            parts.append(pa.table(values + [column.combine_chunks() for column in counts.columns], schema=_SUMMARY))
        return pa.concat_tables(parts)

    def _entries(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return `round`, `stage` and `undone` of each round, and its entry in `ledger.json`."""
        record = self._files.read()
        standing = set(standing_rounds(record))
        return [
            ({"round": entry["round"], "stage": entry["stage"], "undone": number not in standing}, entry)
            for number, entry in enumerate(record["rounds"])
        ]

    def diff(self, round_a: int, round_b: int) -> pa.Table:
        """
        Find the pairs whose state after one round differs from that after another, without undone rounds.

        Args:
            round_a (`int`):
                A round; 0 is the source set.
            round_b (`int`):
                Another round.

        Returns:
            `pa.Table`: `pair_id`, `flipped_a`, `kept_a`, `flipped_b` and `kept_b`.
        """
        states = [self.state(round_a), self.state(round_b)]
        one, other = (state["pair_id"].combine_chunks() for state in states)
        names = one if one.equals(other) else pa.concat_arrays([one, other]).unique()
        columns: dict[str, np.ndarray] = {}
        for side, state in zip("ab", states, strict=True):
            known = state_of(names, state)
            columns |= {f"{name}_{side}": known[name] for name in ("flipped", "kept")}
        differs = (columns["flipped_a"] != columns["flipped_b"]) | (columns["kept_a"] != columns["kept_b"])
        return pa.table({"pair_id": names, **columns}).filter(pa.array(differs))

    def undo(self, round: int, stage: str | None = None) -> None:
        """
        Undo a round, or one stage of it: it no longer counts, and stays in the ledger.

        Args:
            round (`int`):
                Number of the round.
            stage (`str`, *optional*):
                Name of the stage; all stages by default.

        Raises:
            `ValueError`: if nothing of it counts.
        """
        self._record_event("undo", round, stage)

    def redo(self, round: int, stage: str | None = None) -> None:
        """
        Let a round, or one stage of it, count again after [`~CurationLedger.undo`].

        Args:
            round (`int`):
                Number of the round.
            stage (`str`, *optional*):
                Name of the stage; all stages by default.

        Raises:
            `ValueError`: if nothing of it is undone, or another in its place counts.
        """
        self._record_event("redo", round, stage)

    def _record_event(self, kind: Literal["undo", "redo"], round: int, stage: str | None) -> None:
        record = self._files.read()
        rounds, standing = record["rounds"], set(standing_rounds(record))
        meant = [
            number
            for number, entry in enumerate(rounds)
            if entry["round"] == round and stage in (None, entry["stage"]) and (number in standing) == (kind == "undo")
        ]
        if kind == "redo":  # of several attempts the last, unless another counts
            taken = {round_key(rounds[number]) for number in standing}
            latest = {round_key(rounds[number]): number for number in meant}
            meant = [number for key, number in latest.items() if key not in taken]
        if not meant:
            what = f"round {round}" + ("" if stage is None else f", stage {stage!r}")
            raise ValueError(
                f"Nothing of {what} {'stands' if kind == 'undo' else 'is undone'}, so there is no {kind}."
            )
        record["events"].append({kind: [rounds[number]["file"] for number in meant]})
        self._files.write(record)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """All rounds in order, undone ones too: `round`, `stage`, `file`, `sha256`, `pairs`, `models`, `settings`."""
        return self._files.read()["rounds"]

    @property
    def standing(self) -> list[dict[str, Any]]:
        """The rounds that count, as in `rounds`, those of persons last."""
        record = self._files.read()
        return [record["rounds"][number] for number in standing_rounds(record)]

    @property
    def source_set(self) -> str | None:
        """Fingerprint of the source set; `None` if the ledger does not know it."""
        return self._files.read()["source_set"]

    @staticmethod
    def is_manual(entry: Mapping[str, Any]) -> bool:
        """Tell a round of `rounds` in which a person decided."""
        return is_manual(entry["stage"])

    def table(self, entry: Mapping[str, Any], columns: Sequence[str] | None = None) -> pa.Table:
        """
        Read the decisions of a round.

        Args:
            entry (`Mapping`):
                The round, one of `rounds`.
            columns (`Sequence[str]`, *optional*):
                Columns to read; all by default.

        Returns:
            `pa.Table`: `pair_id`, `source`, `was_flipped`, `flipped`, `action`, `reason` and `strength`; and where the
            round has them `chosen_0`, `rejected_0`, ... for each model, and `vote_0_0`, `vote_0_1`, ... for each
            judge, with and without position swap.
        """
        return self._files.table(entry, columns)

    def files(self) -> list[tuple[str, bytes]]:
        """
        Read the files of the ledger, as they are at one moment.

        Returns:
            `list[tuple[str, bytes]]`: name and content of each.
        """
        record = self._files.read()
        tables = [(entry["file"], self._files.verified(entry).read_bytes()) for entry in record["rounds"]]
        return [("ledger.json", (json.dumps(record, indent=2) + "\n").encode()), *tables]


@dataclass(frozen=True)
class Corrections:
    """The content of a file of corrections."""

    source_set: str | None  # its fingerprint
    wanted: dict[str, tuple[bool, bool]]  # by `pair_id`: flipped against the source set, and kept
    unsure: list[str]  # pairs about which nothing is decided


def read_corrections(path: str | os.PathLike) -> Corrections:
    """Read a file of corrections; raise a `ValueError` if it is none, or an entry is incomplete or repeated."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); export it from the report once more.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'{path} is no file of corrections: its `format` has to be "{FORMAT}".')
    if content.get("version") != VERSION:
        raise ValueError(f"{path} has version {content.get('version')!r}; this release reads version {VERSION}.")
    corrections = Corrections(content.get("source_set"), {}, [])
    for number, entry in enumerate(content.get("corrections") or []):
        where = f"Correction {number} of {path}"
        if not isinstance(entry, dict) or not isinstance(name := entry.get("pair_id"), str):
            raise ValueError(f"{where} has no `pair_id`; name the pair.")
        verdict = entry.get("verdict")
        if verdict not in VERDICTS:
            raise ValueError(f"{where} has the verdict {verdict!r:.40}; give one of {', '.join(VERDICTS)}.")
        if name in corrections.wanted or name in corrections.unsure:
            raise ValueError(f"{where} speaks of {name!r} a second time; leave one of them.")
        if verdict == "unsure":
            corrections.unsure.append(name)
            continue
        for key in ("flipped", "kept"):
            if not isinstance(entry.get(key), bool):
                raise ValueError(f"{where} has {entry.get(key)!r:.40} as `{key}`; give true or false.")
        corrections.wanted[name] = (entry["flipped"], entry["kept"])
    return corrections
