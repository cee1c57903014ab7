"""Write the golden files anew, on purpose: `python -m tests.golden.write`, with pytest's options if wanted."""

import os
import sys

import pytest

from .golden import FILES, WRITE


if __name__ == "__main__":
    os.environ[WRITE] = "1"
    if len(sys.argv) == 1:  # all are written, so that one without a test does not stay
        for file in FILES.glob("*.json"):
            file.unlink()
    sys.exit(pytest.main([str(FILES.parent), "-q", *sys.argv[1:]]))
