"""These tests run on a GPU, or in Triton's interpreter, which `tests/kernels/test_triton.py` starts by

TRITON_INTERPRET=1 python -m pytest tests/kernels/triton
"""

import importlib.util
import os

import torch

can_run = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None or not can_run:
    collect_ignore_glob = ["test_*.py"]
