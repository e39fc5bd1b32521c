"""Makes tests/checkpoint/tiny_folders.py and tests/engine/w8a8_reference.py importable: pytest's importlib mode puts no
test folder on the path."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "engine")]
