"""The parts that benchmarks share. Importing any of them puts the checkout in the path, for `tests`."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))
