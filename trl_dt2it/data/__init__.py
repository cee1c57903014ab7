"""Preference data: public sets as canonical rows, their checks, their mixture, and how images are read."""

from .decontaminate import decontaminate, vl_rewardbench_source_ids
from .errors import REASONS, RowError
from .identity import content_id
from .images import check_image, load_image
from .load import load_preferences
from .locations import ImageOptions
from .mixing import mix, split_by_group
from .mixture import build_mixture, read_benchmarks
from .prepare import SourceSettings, prepare_shard, read_settings, write_parquet
from .quarantine_report import ValidationReport, quarantine_report
from .rows import Video, row_images, row_name, row_videos
from .schema import check_row, special_token_pattern
from .sources import SOURCES
from .t2i import reformulate_t2i, split_t2i
from .t2i_templates import T2ITemplate
from .validation import readmit, validate


__all__ = [
    "REASONS",
    "SOURCES",
    "ImageOptions",
    "RowError",
    "SourceSettings",
    "T2ITemplate",
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
    "validate",
    "vl_rewardbench_source_ids",
    "write_parquet",
]
