"""Where the rows of a recipe are, as its command line says, and how a recipe shows what it would do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, get_dataset_config_info
from rich.console import Console
from rich.table import Table

from .curation.rounds.config import read_set
from .data.images import ImageOptions


@dataclass
class RowArguments:
    """
    Which rows a recipe reads.

    Parameters:
        dataset_name (`str`, *optional*):
            A Parquet, JSON or JSON lines file, a folder, or a Hub id.
        dataset_config (`str`, *optional*):
            Configuration of a set on the Hub.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split.
        preferences (`str`, *optional*):
            Name of a public set or of a format that [`trl_dt2it.data.load_preferences`] knows, such as `rlaif_v`,
            `llamafactory` or `ms_swift`; with it, `dataset_name` is its file or folder.
        image_root (`str`, *optional*):
            Folder that the paths of images start from, and that none may leave.
        max_rows (`int`, *optional*):
            Takes the first so many rows only.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Rows: a file, a folder or a Hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration, on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split."})
    preferences: str | None = field(
        default=None, metadata={"help": "Public set or format, such as rlaif_v, llamafactory or ms_swift."}
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder that paths of images start from."})
    max_rows: int | None = field(default=None, metadata={"help": "Take the first so many rows only."})

    def read(self) -> Dataset:
        """
        The rows, images still encoded.

        Returns:
            `Dataset`: preference rows; where they have no column `source`, none is added.

        Raises:
            `ValueError`: if no set is named, or a file is missing.
        """
        spec: dict[str, Any] = {"max_rows": self.max_rows}
        if self.preferences is not None:
            spec |= {"preferences": self.preferences, "path_or_id": self.dataset_name, "split": self.dataset_split}
            spec |= {"image_root": self.image_root}
            return read_set("preferences", self.preferences, spec)
        if self.dataset_name is None:
            raise ValueError("Give `dataset_name`, the file, folder or Hub id of the rows.")
        spec |= {"dataset_name": self.dataset_name, "dataset_config": self.dataset_config}
        return read_set("dataset_name", "own", {**spec, "dataset_split": self.dataset_split})

    @property
    def image_options(self) -> ImageOptions:
        """Where images may come from; a format has resolved its paths when it was read."""
        return ImageOptions(image_root=None if self.preferences is not None else self.image_root)

    @property
    def published_images(self) -> ImageOptions:
        """Where images may come from that are written into files."""
        return ImageOptions(image_root=self.image_root)


def hub_rows(name: str, config: str | None, split: str) -> int | None:
    """Rows that the Hub says a split has, without downloading it; `None` where it does not say."""
    info = get_dataset_config_info(name, config)
    known = (info.splits or {}).get(split)
    return None if known is None else known.num_examples


def show_dry_run(rows: Iterable[tuple[str, object]], console: Console | None = None) -> None:
    """
    Prints what a recipe would read and write.

    Args:
        rows (`Iterable[tuple[str, object]]`):
            A word and what belongs to it, one for each line; `None` leaves the line out.
        console (`rich.console.Console`, *optional*):
            Where to; by default the terminal.
    """
    table = Table(title="Dry run: nothing is written", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    (console or Console()).print(table)
