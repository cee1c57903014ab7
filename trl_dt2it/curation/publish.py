"""A curated data set on the Hub, with its ledger and its card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData, HfApi

from ..data.cards import PAPER, PROJECT_URL, cell, code_span, hub_ids, licence_of, name_cell, source_lines, table
from ..data.contents import pair_contents
from ..data.export import parquet_shards, published_features
from ..data.images import ImageOptions
from ..data.mixing import with_columns
from ..data.sources import SOURCES
from ..debias.style import parts_by
from .ledger import CurationLedger, Labels


# Identifiers on the Hub of the licenses of the public sets, and some more.
_HUB_LICENCES = {
    *("mit", "apache-2.0", "bsd-3-clause", "cdla-permissive-2.0", "odc-by", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "openrail", "unknown"),
}

_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")

# Folders of the repository, of which a push replaces the files.
_FOLDERS = ("data/", "dropped/", "ledger/")

_COUNTS = ("kept", "flipped", "dropped")


def push_curated(
    dataset: Dataset,
    ledger: CurationLedger,
    repo_id: str,
    *,
    split: str = "train",
    with_dropped: bool = False,
    refresh_strength: bool = False,
    labels: Labels = "hard",
    licences: Mapping[str, str] | None = None,
    image_root: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Curated preferences and their ledger",
    max_shard_bytes: int = 500_000_000,
) -> CommitInfo:
    """
    Push a curated data set and its ledger to the Hub, in one commit.

    The repository gets `data/train-00000.parquet` and so on, with all images in them; the folder `ledger`, which
    [`CurationLedger`] reads; and a card with counts for each source and round, licenses, and models and settings of
    each decision. Files of an earlier push in these folders are deleted. The ledger goes up as it is: it names models,
    paths of local models too, and endpoints of judges, but holds no keys.

    Args:
        dataset, ledger (`Dataset`, [`CurationLedger`]):
            The source set, and its ledger, which is applied to it.
        repo_id, revision (`str`):
            The repository and, optionally, a branch; both are made if they are not there.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split.
        with_dropped (`bool`, *optional*, defaults to `False`):
            Whether dropped pairs go up too, as the configuration `"dropped"`, so that every round can be undone.
        refresh_strength, labels (`bool`, `str`, *optional*, defaults to `False` and `"hard"`):
            As in [`CurationLedger.apply`].
        licences (`Mapping[str, str]`, *optional*):
            Licenses by source, such as `{"own": "cc-by-4.0"}`, for sources that are not sets of [`load_preferences`].
        image_root (`str`, *optional*):
            Folder from which images may be read. Without it, images have to be within the rows, because a row may name
            any file of this machine.
        private (`bool`, *optional*):
            Whether a new repository is private; by default as the organization has it, and else public.
        token, commit_message (`str`, *optional*):
            Token, by default that of the login, and message of the commit.
        max_shard_bytes (`int`, *optional*, defaults to 500 MB):
            Size at which a file ends, after a multiple of 100 rows. One file is held in memory.

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        `ValueError`: if the ledger is empty, covers none of the rows, or `split` is not a word.
        [`RowError`]: if an image is not there or may not be read; the message names the row.

    Example:

    ```python
    >>> from trl_dt2it.curation import CurationLedger, push_curated

    >>> push_curated(pool, CurationLedger("outputs/dt2it/ledger"), "me/curated-preferences", private=True)
    ```
    """
    if not re.fullmatch(r"\w+(\.\w+)*", split):
        raise ValueError(f"`split` is {split!r}; give a word such as train.")
    if not len(ledger.state()):
        raise ValueError(f"The ledger in {ledger.directory} holds no round that stands; there is nothing to publish.")
    options, contents = ImageOptions(image_root=image_root), pair_contents(dataset, image_root=image_root)
    names = contents["pair_id"].combine_chunks()
    dataset = with_columns(dataset, {"pair_id": names})
    curated = ledger.apply(dataset, refresh_strength=refresh_strength, labels=labels, contents=contents)
    columns = list(published_features(curated.features))
    about: dict[str, Any] = {"split": split, "with_dropped": with_dropped}
    card = curated_card(dataset, ledger, repo_id, columns=columns, licences=licences, contents=contents, **about)
    files = ledger.files()

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
    parts = [(f"data/{split}", curated)]
    if with_dropped:
        dropped = np.flatnonzero(~ledger.labels(names, contents=contents)["kept"])
        parts.append((f"dropped/{split}", dataset.select(dropped)))
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for stem, rows in parts:
        for number, content in enumerate(parquet_shards(rows, options, max_shard_bytes)):
            addition = CommitOperationAdd(f"{stem}-{number:05d}.parquet", content)
            # Uploaded one by one, so that memory holds one; the commit alone makes them visible.
            api.preupload_lfs_files(repo_id, [addition], repo_type="dataset", revision=revision)
            operations.append(addition)
    operations += [CommitOperationAdd(f"ledger/{name}", content) for name, content in files]
    operations.append(CommitOperationAdd("README.md", str(card).encode()))
    new = {operation.path_in_repo for operation in operations}
    old = api.list_repo_files(repo_id, repo_type="dataset", revision=revision)
    operations += [CommitOperationDelete(path) for path in old if path.startswith(_FOLDERS) and path not in new]
    return api.create_commit(
        repo_id, operations, commit_message=commit_message, repo_type="dataset", revision=revision
    )


def curated_card(
    dataset: Dataset,
    ledger: CurationLedger,
    repo_id: str,
    *,
    columns: Sequence[str],
    split: str = "train",
    with_dropped: bool = False,
    licences: Mapping[str, str] | None = None,
    contents: pa.Table | None = None,
) -> DatasetCard:
    """Make the card of a curated data set."""
    contents = pair_contents(dataset) if contents is None else contents
    known = ledger.labels(contents["pair_id"].combine_chunks(), contents=contents)
    kept, flipped = known["kept"], known["flipped"]
    parts = parts_by(dataset, "source", optional="source") or {"": np.arange(len(dataset))}
    parts = {"" if name == "None" else name: rows for name, rows in parts.items()}  # rows without a source
    linked = source_lines({name: len(rows) for name, rows in parts.items()}, licences)
    lines = [
        (shown, pairs, *_counts(kept[rows], flipped[rows]).values(), licence)
        for (shown, pairs, licence), rows in zip(linked, parts.values(), strict=True)
    ]
    own = {name: licence_of(name, licences) for name in parts}
    configs = [{"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*.parquet"}]}]
    if with_dropped:
        configs.append({"config_name": "dropped", "data_files": [{"split": split, "path": "dropped/*.parquet"}]})
    card_data = DatasetCardData(
        license=sorted({name if name in _HUB_LICENCES else "other" for name in map(str.lower, own.values())}),
        pretty_name=repo_id.split("/")[-1],
        size_categories=_SIZES[min(max(len(str(int(kept.sum()))) - 3, 0), len(_SIZES) - 1)],
        tags=["preferences", "reward-model", "curated", "trl", "trl-dt2it"],
        source_datasets=hub_ids(list(parts)) or None,
        configs=configs,
    )
    return DatasetCard.from_template(
        card_data,
        template_path=str(files("trl_dt2it").joinpath("templates/dataset_card.md")),
        citation=PAPER["citation"],
        columns=[code_span(name) for name in columns],
        name=name_cell(repo_id.split("/")[-1]),
        non_commercial=[
            cell(name)
            for name, licence in own.items()
            if "-nc" in licence.lower() or (name in SOURCES and SOURCES[name].is_non_commercial)
        ],
        project_url=PROJECT_URL,
        provenance=[
            {
                "name": f"round {entry['round']}, {entry['stage']}",
                "models": [cell(name) for name in entry["models"]],
                "settings": code_span(
                    json.dumps({k: v for k, v in entry["settings"].items() if k != "digest"}, ensure_ascii=False)
                ),
            }
            for entry in ledger.standing
        ],
        repo_id=repo_id,
        rounds=ledger_lines(ledger),
        sources=lines,
        split=split,
        total={"pairs": f"{len(dataset):,}", **_counts(kept, flipped)},
        unknown=[cell(name) or "pairs without a source" for name, licence in own.items() if licence == "unknown"],
        versions=[(name, version(name)) for name in ("trl-dt2it", "trl", "transformers", "datasets")],
        with_dropped=with_dropped,
    )


def ledger_lines(ledger: CurationLedger) -> list[tuple[str, ...]]:
    """List round, stage, pairs, and those kept, flipped and dropped, of each round that counts, over all sources."""
    summary = ledger.summary()
    columns = ("pairs", "keep", "flip", "drop")
    groups = summary.filter(pc.invert(summary["undone"])).group_by(["round", "stage"], use_threads=False)
    return [
        (str(row["round"]), row["stage"], *(f"{row[f'{name}_sum']:,}" for name in columns))
        for row in groups.aggregate([(name, "sum") for name in columns]).to_pylist()
    ]


def curation_section(ledger: CurationLedger | None, log_history: Sequence[Mapping[str, Any]] = ()) -> str | None:
    """Write the section of a model card on the curation of its training set, by its ledger or else by the last round
    in a log; `None` without either."""
    lines: list[tuple[str, ...]] = []
    if ledger is not None and len(state := ledger.state()):
        counts = _counts(*(state[name].to_numpy().astype(bool) for name in ("kept", "flipped")))
        lines = ledger_lines(ledger)
    elif logged := next((entry for entry in reversed(log_history) if "curation/kept" in entry), None):
        counts = {name: f"{logged[f'curation/{name}']:,}" for name in _COUNTS}
    else:
        return None
    text = (
        f"### Curation\n\nBy reward models, rules and maybe judges: {counts['kept']} pairs are kept, "
        f"{counts['flipped']} of them with chosen and rejected exchanged, and {counts['dropped']} are left out."
    )
    return f"{text}\n\n{table(('round', 'stage', 'pairs', *_COUNTS), lines)}" if lines else text


def _counts(kept: np.ndarray, flipped: np.ndarray) -> dict[str, str]:
    masks = (kept, kept & flipped, ~kept)
    return {name: f"{mask.sum():,}" for name, mask in zip(_COUNTS, masks, strict=True)}
