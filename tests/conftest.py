"""Tests import the files of the repository's root, wherever pytest is started."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)             # tiny tensors: threads would wait for each other
