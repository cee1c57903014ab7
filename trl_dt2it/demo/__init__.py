"""A laboratory for any machine: preferences over real handwriting and a tiny vision-language model to learn them."""

from pathlib import Path


# The name in configuration files of the tiny model that has learned to see, and where it lies; see `reader.py`.
READER = "tiny-qwen3-vl-reader"
READER_DIR = Path(__file__).parent / "tiny_reader"
