"""A laboratory for any machine: preferences over real handwriting and a tiny vision-language model to learn them."""

from pathlib import Path


# Names in configuration files: of the tiny model that is made on the spot, see `tiny.py`, and of the one that has
# learned to see, see `reader.py`, which lies in a folder here.
TINY = "tiny-qwen3-vl"
READER = "tiny-qwen3-vl-reader"
READER_DIR = Path(__file__).parent / "tiny_reader"
