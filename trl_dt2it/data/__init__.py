"""Preference data: what a row is, how it is checked, and how its images are read."""

from .errors import REASONS, RowError
from .identity import content_id
from .images import check_image, load_image
from .locations import ImageOptions
from .rows import Video, row_images, row_name, row_videos
from .schema import check_row, special_token_pattern


__all__ = [
    "REASONS",
    "ImageOptions",
    "RowError",
    "Video",
    "check_image",
    "check_row",
    "content_id",
    "load_image",
    "row_images",
    "row_name",
    "row_videos",
    "special_token_pattern",
]
