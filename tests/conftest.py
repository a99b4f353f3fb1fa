"""Puts the repository's root on the path, so that `python -m pytest` works from anywhere."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
