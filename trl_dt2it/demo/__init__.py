"""Demo for any machine: preferences over real handwriting, and a tiny vision-language model that learns them."""

from pathlib import Path


# Names in configuration files, of the tiny model with random weights and of the trained model in a folder here.
TINY = "tiny-qwen3-vl"
READER = "tiny-qwen3-vl-reader"
READER_DIR = Path(__file__).parent / "tiny_reader"
