"""Whether an installed wheel serves its C++ kernels where there is no compiler: python tests/wheel.py"""

import os
import tempfile
from pathlib import Path

os.environ["PATH"] = ""
os.environ["MOEIFY_CACHE"] = tempfile.mkdtemp()
for variable in ("CXX", "MOEIFY_CPP"):
    os.environ.pop(variable, None)

import torch  # noqa: E402

from moeify import assign  # noqa: E402
from moeify.backends import run  # noqa: E402
from moeify.experts import FFN  # noqa: E402
from moeify.kernels.cpu import cpp  # noqa: E402

for level in cpp.levels():
    os.environ["MOEIFY_CPP"] = level
    assert cpp.explain() == f"{level}, from the wheel", cpp.explain()
    experts, x = FFN(4, 96, 160), torch.randn(20, 96)
    routing = assign(torch.randint(4, (20, 2)), torch.rand(20, 2), 4)
    with torch.no_grad():
        torch.testing.assert_close(run("cpp", x, routing, experts), run("compose", x, routing, experts))
    print(cpp.explain())
assert not (Path(os.environ["MOEIFY_CACHE"]) / "cpp").exists(), "something was compiled"
