"""Preference data: public sets as canonical rows, their checks, their mixture, and how images are read."""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


_MODULES = {
    "REASONS": "errors",
    "SOURCES": "sources",
    "ImageOptions": "locations",
    "RowError": "errors",
    "SourceSettings": "prepare",
    "T2ITemplate": "t2i_templates",
    "TokenCounter": "row_checks",
    "ValidationReport": "quarantine",
    "Video": "rows",
    "build_mixture": "mixture",
    "check_image": "images",
    "check_row": "schema",
    "content_id": "identity",
    "decontaminate": "decontamination",
    "load_image": "images",
    "load_preferences": "load",
    "mix": "mixing",
    "prepare_shard": "prepare",
    "quarantine_report": "quarantine",
    "read_benchmarks": "mixture",
    "read_settings": "prepare",
    "readmit": "validation",
    "reformulate_t2i": "t2i",
    "row_images": "rows",
    "row_name": "rows",
    "row_videos": "rows",
    "special_token_pattern": "schema",
    "split_by_group": "mixing",
    "split_t2i": "t2i",
    "to_dpo": "dpo",
    "validate": "validation",
    "vl_rewardbench_source_ids": "decontamination",
    "with_canonical_columns": "mixing",
    "write_parquet": "prepare",
}

__all__ = [
    "REASONS",
    "SOURCES",
    "ImageOptions",
    "RowError",
    "SourceSettings",
    "T2ITemplate",
    "TokenCounter",
    "ValidationReport",
    "Video",
    "build_mixture",
    "check_image",
    "check_row",
    "content_id",
    "decontaminate",
    "load_image",
    "load_preferences",
    "mix",
    "prepare_shard",
    "quarantine_report",
    "read_benchmarks",
    "read_settings",
    "readmit",
    "reformulate_t2i",
    "row_images",
    "row_name",
    "row_videos",
    "special_token_pattern",
    "split_by_group",
    "split_t2i",
    "to_dpo",
    "validate",
    "vl_rewardbench_source_ids",
    "with_canonical_columns",
    "write_parquet",
]

if TYPE_CHECKING:
    from .decontamination import decontaminate, vl_rewardbench_source_ids
    from .dpo import to_dpo
    from .errors import REASONS, RowError
    from .identity import content_id
    from .images import check_image, load_image
    from .load import load_preferences
    from .locations import ImageOptions
    from .mixing import mix, split_by_group, with_canonical_columns
    from .mixture import build_mixture, read_benchmarks
    from .prepare import SourceSettings, prepare_shard, read_settings, write_parquet
    from .quarantine import ValidationReport, quarantine_report
    from .row_checks import TokenCounter
    from .rows import Video, row_images, row_name, row_videos
    from .schema import check_row, special_token_pattern
    from .sources import SOURCES
    from .t2i import reformulate_t2i, split_t2i
    from .t2i_templates import T2ITemplate
    from .validation import readmit, validate

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
