"""A curated data set on the Hub, with the ledger that says how it came about."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from datasets import Dataset
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi

from ..data.contents import pair_contents
from ..data.export import parquet_shards, published_features
from ..data.images import ImageOptions
from ..data.mixing import with_columns
from .dataset_card import curated_card
from .ledger import CurationLedger


_FOLDERS = ("data/", "dropped/", "ledger/")


def push_curated(
    dataset: Dataset,
    ledger: CurationLedger,
    repo_id: str,
    *,
    split: str = "train",
    with_dropped: bool = False,
    refresh_strength: bool = False,
    licences: Mapping[str, str] | None = None,
    image_root: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Curated preferences and their ledger",
    max_shard_bytes: int = 500_000_000,
) -> CommitInfo:
    """
    Pushes a curated data set and its ledger to the Hub, in one commit.

    The repository gets `data/train-00000.parquet` and so on, with all images in them, which `load_dataset` reads; the
    folder `ledger`, which [`CurationLedger`] reads; and a card with counts for each source and round, licences, and
    which models decided by which settings. What an earlier push left in these places goes. The ledger goes up as it
    is: it names models, paths of local ones too, and endpoints of judges, but holds no keys. What it decided about
    pairs that are no longer the same is not applied, as [`CurationLedger.apply`] says.

    Args:
        dataset (`Dataset`):
            The source set; the ledger is applied to it.
        ledger ([`CurationLedger`]):
            The ledger.
        repo_id (`str`):
            The repository, made if it is not there.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split.
        with_dropped (`bool`, *optional*, defaults to `False`):
            Whether dropped pairs go up too, as the configuration `"dropped"`. With them every round can be undone.
        refresh_strength (`bool`, *optional*, defaults to `False`):
            As in [`CurationLedger.apply`].
        licences (`Mapping[str, str]`, *optional*):
            Licences by source, such as `{"own": "cc-by-4.0"}`, for sources that are no sets of [`load_preferences`].
        image_root (`str`, *optional*):
            Folder out of which images may be read. Without it, they have to be within the rows, because a row may name
            any file of this machine.
        private (`bool`, *optional*):
            Whether a new repository is private; by default public, unless the organization's default says otherwise,
            as in `datasets`.
        token (`str`, *optional*):
            Token; by default the one of the login.
        revision (`str`, *optional*):
            Branch; made if it is not there.
        commit_message (`str`, *optional*):
            Message of the commit.
        max_shard_bytes (`int`, *optional*, defaults to 500 MB):
            A file ends with the 100 rows with which it has reached this size. One is held in memory.

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        `ValueError`: if the ledger speaks of none of the rows, or holds nothing, or `split` is no word.
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
    curated = ledger.apply(dataset, refresh_strength=refresh_strength, contents=contents)
    features = published_features(curated.features)
    card = curated_card(
        dataset,
        ledger,
        repo_id,
        columns=list(features),
        split=split,
        with_dropped=with_dropped,
        licences=licences,
        contents=contents,
    )
    files = ledger.files()

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
    parts = [(f"data/{split}", curated)]
    if with_dropped:
        names = contents["pair_id"].combine_chunks()
        dropped = np.flatnonzero(~ledger.labels(names, contents=contents)["kept"])
        parts.append((f"dropped/{split}", with_columns(dataset, {"pair_id": names}).select(dropped)))
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for stem, rows in parts:
        for number, content in enumerate(parquet_shards(rows, options, max_shard_bytes)):
            addition = CommitOperationAdd(f"{stem}-{number:05d}.parquet", content)
            # Uploaded one by one, so that memory holds one; they are seen with the commit alone.
            api.preupload_lfs_files(repo_id, [addition], repo_type="dataset", revision=revision)
            operations.append(addition)
    operations += [CommitOperationAdd(f"ledger/{name}", content) for name, content in files]
    operations.append(CommitOperationAdd("README.md", str(card).encode()))
    new = {operation.path_in_repo for operation in operations}
    old = api.list_repo_files(repo_id, repo_type="dataset", revision=revision)
    stale = [path for path in old if path.startswith(_FOLDERS) and path not in new]
    operations += [CommitOperationDelete(path) for path in stale]
    return api.create_commit(
        repo_id, operations, commit_message=commit_message, repo_type="dataset", revision=revision
    )
