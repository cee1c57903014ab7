"""Preference data: what a row is, how it is checked, and how its images are read."""

from .images import ImageOptions, check_image, load_image
from .schema import REASONS, RowError, check_row, content_id, row_images, row_name, special_token_pattern


__all__ = [
    "REASONS",
    "ImageOptions",
    "RowError",
    "check_image",
    "check_row",
    "content_id",
    "load_image",
    "row_images",
    "row_name",
    "special_token_pattern",
]
