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

from ..data.contents import CONTENT_COLUMNS, pair_contents
from .ledger_tables import (
    ACTIONS,
    MANUAL,
    LedgerFiles,
    apply_state,
    as_names,
    decision_of,
    is_manual,
    record_event,
    round_key,
    round_table,
    standing_rounds,
    state_of,
)
from .rules import Decision


_NUMBERED = re.compile(r".*_\d+")


def history_of(files: LedgerFiles, pair_id: str) -> list[dict[str, Any]]:
    """Return what [`CurationLedger.history`] does."""
    record, found = files.read(), []
    standing = set(standing_rounds(record))
    for number, entry in enumerate(record["rounds"]):
        for row in pq.read_table(files.verified(entry), filters=[("pair_id", "==", pair_id)]).to_pylist():
            about = {"round": entry["round"], "stage": entry["stage"], "undone": number not in standing}
            about |= {name: value for name, value in row.items() if not _NUMBERED.fullmatch(name)}
            models = entry["models"] if "chosen_0" in row else []
            scores = {name: (row[f"chosen_{place}"], row[f"rejected_{place}"]) for place, name in enumerate(models)}
            judges = sum(name.startswith("vote_") for name in row) // 2
            votes = [(row[f"vote_{judge}_0"], row[f"vote_{judge}_1"]) for judge in range(judges)]
            found.append({**about, "scores": scores, "votes": votes})
    return found


def summarize(files: LedgerFiles) -> pa.Table:
    """Return what [`CurationLedger.summary`] does."""
    record = files.read()
    standing = set(standing_rounds(record))
    schema = pa.schema(
        [
            *(("round", pa.int64()), ("stage", pa.string()), ("undone", pa.bool_()), ("source", pa.string())),
            *((name, pa.int64()) for name in ("pairs", *ACTIONS)),
            ("mean_strength", pa.float64()),
        ]
    )
    parts = [schema.empty_table()]
    for number, entry in enumerate(record["rounds"]):
        table = files.table(entry, ["source", "action", "strength"])
        action = table["action"].cast(pa.string())
        columns = {"source": table["source"].cast(pa.string()), "strength": table["strength"]}
        columns |= {name: pc.equal(action, name).cast(pa.int64()) for name in ACTIONS}
        found = pa.table(columns).group_by("source", use_threads=False)
        found = found.aggregate([([], "count_all"), *((name, "sum") for name in ACTIONS), ("strength", "mean")])
        about = {"round": entry["round"], "stage": entry["stage"], "undone": number not in standing}
        values = [pa.array([value] * len(found)) for value in about.values()]
        values += [column.combine_chunks() for column in found.columns]
        parts.append(pa.table(values, schema=schema))
    return pa.concat_tables(parts)


def difference(first: pa.Table, second: pa.Table) -> pa.Table:
    """Return what [`CurationLedger.diff`] does, of two states."""
    one, other = (state["pair_id"].combine_chunks() for state in (first, second))
    names = one if one.equals(other) else pa.concat_arrays([one, other]).unique()
    columns: dict[str, np.ndarray] = {}
    for side, state in zip("ab", (first, second), strict=True):
        known = state_of(names, state)
        columns |= {f"{name}_{side}": known[name] for name in ("flipped", "kept")}
    differs = (columns["flipped_a"] != columns["flipped_b"]) | (columns["kept_a"] != columns["kept_b"])
    return pa.table({"pair_id": names, **columns}).filter(pa.array(differs))


FORMAT = "trl-dt2it corrections"

VERSION = 1

VERDICTS = ("accept", "wrong", "unsure")


@dataclass(frozen=True)
class Corrections:
    """The content of a file of corrections."""

    source_set: str | None  # its fingerprint
    wanted: dict[str, tuple[bool, bool]]  # by `pair_id`: flipped against the source set, and kept
    unsure: tuple[str, ...] = ()  # nothing is done about them


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
    wanted: dict[str, tuple[bool, bool]] = {}
    unsure: list[str] = []
    for number, entry in enumerate(content.get("corrections") or []):
        name = _checked(path, number, entry)
        if name in wanted or name in unsure:
            raise ValueError(f"Correction {number} of {path} speaks of {name!r} a second time; leave one of them.")
        if entry["verdict"] == "unsure":
            unsure.append(name)
        else:
            wanted[name] = (entry["flipped"], entry["kept"])
    return Corrections(content.get("source_set"), wanted, tuple(unsure))


def corrective_actions(given: Corrections, state: pa.Table) -> dict[str, str | None]:
    """Return what makes pairs stand as a person wants them: `keep`, `flip` or `drop`, seen from the present state of
    each, or `None` where a person has decided the same before.
    """
    names = pa.array(list(given.wanted), pa.string())
    places = pc.index_in(names, value_set=state["pair_id"].combine_chunks()).to_pylist()
    flipped, kept, stage = (state[name].to_pylist() for name in ("flipped", "kept", "stage"))
    actions: dict[str, str | None] = {}
    for (name, (flip, keep)), place in zip(given.wanted.items(), places, strict=True):
        # A dropped pair has a side too, but it makes no difference which.
        same_side = place is None or flipped[place] == flip
        if place is not None and is_manual(stage[place]) and kept[place] == keep and (same_side or not keep):
            actions[name] = None
        else:
            actions[name] = "drop" if not keep else "keep" if same_side else "flip"
    return actions


def _checked(path: str | os.PathLike, number: int, entry: Any) -> str:
    where = f"Correction {number} of {path}"
    if not isinstance(entry, dict) or not isinstance(entry.get("pair_id"), str):
        raise ValueError(f"{where} has no `pair_id`; name the pair.")
    if entry.get("verdict") not in VERDICTS:
        raise ValueError(f"{where} has the verdict {entry.get('verdict')!r:.40}; give one of {', '.join(VERDICTS)}.")
    if entry["verdict"] != "unsure":
        for name in ("flipped", "kept"):
            if not isinstance(entry.get(name), bool):
                raise ValueError(f"{where} has {entry.get(name)!r:.40} as `{name}`; give true or false.")
    return entry["pair_id"]


_STAGE = re.compile(r"[a-z0-9][a-z0-9_-]*")


class CurationLedger:
    """
    What was decided about every pair, round by round.

    Rounds are added, never changed. What a round says of a pair replaces what earlier ones said, and what a person
    says (stages `"manual"`, from [`~CurationLedger.correct`]) stands against all rounds, later ones too. A round can
    be undone, which is recorded, and taken back. Several processes may read a ledger; only one may write.

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
        Adds what a stage of a round decided. The same once more changes nothing, so that a run that was killed may
        repeat itself.

        Args:
            round (`int`):
                Number of the round, from 1; not below that of an earlier one that stands.
            stage (`str`):
                What was done, as in `"flip"`: lower-case letters, digits, `-` and `_`.
            pair_ids (sequence of `str`, of length N):
                Names of the pairs, from [`pair_ids`].
            decision ([`Decision`], *optional*):
                What becomes of them.
            actions (sequence of `str`, *optional*):
                `"keep"`, `"flip"` or `"drop"` for each, in place of a decision.
            sources (sequence of `str`, *optional*):
                Source of each pair.
            scores (`np.ndarray` of shape `(N, 2, M)`, *optional*):
                Rewards of chosen and of rejected, as the pairs stood when they were scored; NaN where there is none.
            models (`Sequence[str]`, *optional*):
                Names of the M models.
            strength (`np.ndarray` of shape `(N,)`, *optional*):
                Strengths after the decision; by default those of the decision, or what was known before.
            votes (`np.ndarray` of shape `(N, J, 2)`, *optional*):
                Votes of J judges in both orders, as in [`relabel_by_vote`].
            settings (`Mapping`, *optional*):
                Rules, thresholds, names of judges and the like; must fit into JSON.
            orientation (`str`, *optional*, defaults to `"current"`):
                How the pairs stood when they were scored: `"current"`, as [`~CurationLedger.apply`] gives them, or
                `"source"`, as the source set has them. A flip counts from there.
            source_set (`str`, *optional*):
                Fingerprint of the source set, from [`~trl_dt2it.data.contents.source_fingerprint`]: the first
                is kept, and another one refused.
            contents (`pa.Table`, *optional*):
                What is in the pairs, from [`~trl_dt2it.curation.pair_contents`]. By it [`~CurationLedger.apply`] knows
                whether a pair is still what was decided about.

        Raises:
            `ValueError`: if an argument has a wrong shape or value, or the round has this stage with other content.
        """
        if not isinstance(round, int) or round < 1 or not _STAGE.fullmatch(stage):
            raise ValueError(
                f"Round {round!r}, stage {stage!r}: give a number from 1, and lower-case letters, digits, - and _."
            )
        if (decision is None) == (actions is None):
            raise ValueError("Give either `decision` or `actions`.")
        if orientation not in ("current", "source"):
            raise ValueError(f'`orientation` is {orientation!r}; give "current" or "source".')
        record = self._files.read()
        if source_set is not None and record["source_set"] not in (None, source_set):
            raise ValueError(f"The ledger in {self.directory} belongs to another source set; use another directory.")
        standing = standing_rounds(record)
        same = [number for number in standing if round_key(record["rounds"][number]) == (round, stage)]
        before = [number for number in standing if not same or number < same[0]]
        # A person's word holds for every round, and so stands in no one's way.
        earlier = [record["rounds"][number] for number in before]
        latest = max((entry["round"] for entry in earlier if not is_manual(entry["stage"])), default=1)
        if round < latest:
            raise ValueError(f"Round {round} comes after round {latest}; number rounds in order, or undo the later.")

        names = as_names(pair_ids, "pair_ids")
        # A pair that has been changed since then stands as it does now.
        known = state_of(names, self._files.merged(record, before, contents))
        was_flipped = known["flipped"] if orientation == "current" else np.zeros(len(names), dtype=bool)
        if decision is None:
            # What is known of the strength is so in the present orientation.
            turn = np.where(known["flipped"] == was_flipped, 1.0, -1.0)
            reason = "decided by a person" if is_manual(stage) else f"decided by {stage}"
            decision = decision_of(actions, reason, known["strength"] * turn)
        table = round_table(
            names,
            decision,
            sources=None if sources is None else as_names(sources, "sources", len(names)),
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
            # One of the two may not know what is in the pairs.
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
        self._files.add(record, {"round": round, "stage": stage, **about}, table)

    def correct(self, actions: Mapping[str, str], *, settings: Mapping[str, Any] | None = None) -> None:
        """
        Adds what a person decided about single pairs. It stands against all rounds, until it is undone or corrected.

        Args:
            actions (`Mapping[str, str]`):
                For each `pair_id` `"keep"`, `"flip"` or `"drop"`, seen from the present state of the pair.
            settings (`Mapping`, *optional*):
                Who, why, and the like.

        Raises:
            `ValueError`: if there is no round yet, a pair is not in the ledger, or an action is another word.
        """
        if not actions:
            raise ValueError("`actions` is empty; name at least one pair.")
        record = self._files.read()
        known = self.state()["pair_id"].combine_chunks()
        names = pa.array(list(actions), pa.string())
        unknown = names.filter(pc.invert(pc.is_in(names, value_set=known)))
        if len(unknown):
            raise ValueError(f"{len(unknown)} of {len(names)} pairs are not in the ledger, {unknown[0]} the first.")
        latest = max(record["rounds"][number]["round"] for number in standing_rounds(record))
        earlier = sum(entry["round"] == latest and is_manual(entry["stage"]) for entry in record["rounds"])
        stage = MANUAL if earlier == 0 else f"{MANUAL}-{earlier + 1}"
        # The person has seen the pairs that the last round knows of.
        contents = self._files.contents(record, names)
        self.append(
            latest,
            stage,
            pair_ids=names,
            actions=list(actions.values()),
            settings=settings,
            contents=contents if any(contents[name].null_count < len(names) for name in CONTENT_COLUMNS) else None,
        )

    def correct_from(self, path: str | os.PathLike) -> dict[str, int]:
        """
        Adds what a person decided in the report, out of the file that it exports.

        Args:
            path (`str` or `os.PathLike`):
                The file, as in [`~trl_dt2it.curation.ledger.read_corrections`].

        Returns:
            `dict[str, int]`: how many pairs are from now on to `keep` as they stand, to `flip` and to `drop`; about
            how many a person had decided the same `before`; and about how many the person is `unsure`, of which
            nothing is noted.

        Raises:
            `ValueError`: as [`~CurationLedger.correct`], or if the file is wrong or is of another source set.
        """
        given, own = read_corrections(path), self._files.read()["source_set"]
        if given.source_set != own and None not in (given.source_set, own):
            raise ValueError(f"{path} is of another source set than the ledger in {self.directory}; take its own.")
        counts = {**dict.fromkeys((*ACTIONS, "before"), 0), "unsure": len(given.unsure)}
        actions = corrective_actions(given, self.state())
        for action in actions.values():
            counts[action or "before"] += 1
        new = {name: action for name, action in actions.items() if action is not None}
        if new:
            self.correct(new, settings={"file": Path(path).name})
        return counts

    def state(self, after: int | None = None, *, contents: pa.Table | None = None) -> pa.Table:
        """
        What holds for every pair that the ledger speaks of.

        Args:
            after (`int`, *optional*):
                Only what was decided up to and with this round; 0 gives the source set, that is no row.
            contents (`pa.Table`, *optional*):
                What is in the pairs now, from [`~trl_dt2it.curation.pair_contents`]. What was decided about a pair
                with other content then does not count.

        Returns:
            `pa.Table`: `pair_id`; `flipped`, against the source set; `kept`; `strength`, null if unknown; `round` and
            `stage` that had the last word, 0 and `""` if nothing counts; and with `contents` `changed`, whether the
            last word is about other content. What is undone does not count.
        """
        record = self._files.read()
        standing = standing_rounds(record)
        if after is not None:
            standing = [number for number in standing if record["rounds"][number]["round"] <= after]
        merged = self._files.merged(record, standing, contents)
        entries = merged["entry"].to_numpy()
        # The last is for pairs of which nothing that was said counts.
        rounds = np.array([*(entry["round"] for entry in record["rounds"]), 0], dtype=np.int32)
        stages = [*(entry["stage"] for entry in record["rounds"]), ""]
        codes = np.where(entries < 0, len(stages) - 1, entries).astype(np.int32)
        stage = pa.array(np.array(stages, dtype=object)[codes], pa.string())
        named = {"round": pa.array(rounds[codes]), "stage": stage}
        if contents is not None:
            named["changed"] = merged["changed"]
        columns = [name for name in merged.column_names if name not in ("entry", "changed")]
        return pa.table({**{name: merged[name] for name in columns}, **named})

    def labels(
        self, names: pa.Array, after: int | None = None, *, contents: pa.Table | None = None
    ) -> dict[str, np.ndarray]:
        """
        What holds for given pairs, those that the ledger does not speak of too.

        Args:
            names (`pa.Array` of length N):
                Names of the pairs, from [`pair_ids`].
            after (`int`, *optional*):
                Only what was decided up to and with this round.
            contents (`pa.Table`, *optional*):
                What is in the pairs now, as in [`~CurationLedger.state`].

        Returns:
            `dict[str, np.ndarray]`: `flipped`, `kept`, `strength`, `is_known` and `has_changed`, each of shape `(N,)`.
            What is not known is not flipped and kept, and its strength is NaN.
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
        The curated set: flipped pairs with their answers exchanged, without the dropped ones.

        Every column with `chosen` in its name changes places with its `rejected` partner; images are neither decoded
        nor copied. The column `pair_id` holds the names of the source set from then on, and `curation_flipped` says
        which rows are flipped, so that applying a ledger again, or a later one to a curated set, does it right.

        A decision holds for the pair that it was made about: of pairs whose prompt, answers or images are no longer
        what they were (edited, or swapped without that column) a warning tells the number and the first, and they stay
        as they are, neither flipped nor dropped, unless another round has decided about what they are now.

        Args:
            dataset (`Dataset`):
                The source set, some of its rows, or what was made of it before.
            after (`int`, *optional*):
                Only what was decided up to and with this round.
            refresh_strength (`bool`, *optional*, defaults to `False`):
                Whether the column `strength` takes the strengths of the ledger, those below 0 as 0; a pair without
                one keeps what it has.
            num_proc (`int`, *optional*):
                Number of processes that name and hash rows.
            contents (`pa.Table`, *optional*):
                What is in the rows, and maybe in others, from [`~trl_dt2it.curation.pair_contents`]; by default it is
                looked at, images in files relative to the working directory.

        Returns:
            `Dataset`: rows in their order. Pairs that the ledger does not speak of stay as they are.

        Raises:
            `ValueError`: if the ledger speaks of none of the rows.
        """
        if contents is None:
            contents = pair_contents(dataset, num_proc=num_proc)
        state = self.state(after, contents=contents)
        return apply_state(dataset, state, refresh_strength=refresh_strength, num_proc=num_proc)

    def history(self, pair_id: str) -> list[dict[str, Any]]:
        """
        All that was ever said of a pair.

        Args:
            pair_id (`str`):
                Its name.

        Returns:
            `list[dict]`: for each round that speaks of it, in order: `round`, `stage`, `undone`, `source`, `action`,
            `reason`, `was_flipped`, `flipped`, `strength`, `scores` (for each model the rewards of chosen and
            rejected, as the pair stood) and `votes` (for each judge, in both orders).
        """
        return history_of(self._files, pair_id)

    def summary(self) -> pa.Table:
        """
        What each round did to each source.

        Returns:
            `pa.Table`: `round`, `stage`, `undone`, `source`; the numbers of `pairs`, and of those that it decided to
            `keep`, `flip` and `drop`; and their `mean_strength`.
        """
        return summarize(self._files)

    def diff(self, round_a: int, round_b: int) -> pa.Table:
        """
        The pairs that stand otherwise after one round than after another.

        Args:
            round_a (`int`):
                A round; 0 is the source set.
            round_b (`int`):
                Another.

        Returns:
            `pa.Table`: `pair_id`, `flipped_a`, `kept_a`, `flipped_b` and `kept_b`. What is undone does not count.
        """
        return difference(self.state(round_a), self.state(round_b))

    def undo(self, round: int, stage: str | None = None) -> None:
        """
        Takes back a round, or one stage of it: it does not count any longer, and stays in the ledger.

        Args:
            round (`int`):
                The round.
            stage (`str`, *optional*):
                One of its stages; all of them by default.

        Raises:
            `ValueError`: if nothing of it stands.
        """
        record = self._files.read()
        record_event(record, "undo", round, stage)
        self._files.write(record)

    def redo(self, round: int, stage: str | None = None) -> None:
        """
        Lets a round, or one stage of it, count again after [`~CurationLedger.undo`].

        Args:
            round (`int`):
                The round.
            stage (`str`, *optional*):
                One of its stages; all of them by default.

        Raises:
            `ValueError`: if nothing of it is undone, or another in its place stands.
        """
        record = self._files.read()
        record_event(record, "redo", round, stage)
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
        What a round says of each of its pairs.

        Args:
            entry (`Mapping`):
                The round, one of `rounds`.
            columns (`Sequence[str]`, *optional*):
                Columns to read; all by default.

        Returns:
            `pa.Table`: `pair_id`, `source`, `was_flipped`, `flipped`, `action`, `reason` and `strength`; and where the
            round has them `chosen_0`, `rejected_0`, ... for each model, and `vote_0_0`, `vote_0_1`, ... for each judge
            in both orders.
        """
        return self._files.table(entry, columns)

    def files(self) -> list[tuple[str, bytes]]:
        """
        The files of the ledger, as they are at one moment.

        Returns:
            `list[tuple[str, bytes]]`: name and content of each.
        """
        record = self._files.read()
        tables = [(entry["file"], self._files.verified(entry).read_bytes()) for entry in record["rounds"]]
        return [("ledger.json", (json.dumps(record, indent=2) + "\n").encode()), *tables]
