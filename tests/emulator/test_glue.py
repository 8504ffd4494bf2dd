# SPDX-License-Identifier: Apache-2.0
"""The torch side of the CUDA library, executed without a GPU: csrc/cuda/*.cpp registered for CPU tensors, over the
emulated kernels. Layouts, allocation, alignment, guard, stream and refusals; in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_glue_agrees_with_the_reference_in_every_layout(builder):
    library = builder.build("fastflat_glue")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("glue_cases.py"), library],
        env={**os.environ, "PYTHONPATH": path, "FASTFLAT_DISABLE_LIBRARIES": "cpu,cuda"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) > 1000
