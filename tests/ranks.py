# SPDX-License-Identifier: Apache-2.0
"""Checks that several processes make together over gloo: a script of functions, each called on every rank with a folder
for files. :func:`on_ranks` starts them and tells what each rank found; as a script it is what torchrun starts."""

from __future__ import annotations

import ast
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs a torch with gloo"
)


def checks_of(script: Path) -> list[str]:
    """The names of the functions of one argument called `folder`, in the order of the script."""
    functions = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [f.name for f in functions if [a.arg for a in f.args.args] == ["folder"]]


def on_ranks(count: int, script: Path, names: list[str], folder: Path) -> list[dict[str, str]]:
    """For each rank: 'passed' or what went wrong, by the name of the check."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    run = subprocess.run(
        [*command, __file__, str(script), str(folder), *names],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    file = folder / f"results-{count}.json"
    assert file.is_file(), run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(file.read_text())


def leave() -> None:
    """Ends the process group, once no thread of gloo holds its last work: with that the group would end on the thread,
    which aborts the process."""
    time.sleep(0.1)
    dist.destroy_process_group()


def main(script: Path, folder: Path, names: list[str]) -> None:
    """What one rank does. A check that fails on a rank has failed on all, which go on together."""
    functions = runpy.run_path(str(script))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name in names:
        try:
            functions[name](folder)
            results[name] = "passed"
        except Exception as error:  # reported by the test, with the others
            results[name] = f"{type(error).__name__}: {error}"
            print(dist.get_rank(), name, results[name], flush=True)
        failed = torch.tensor(float(results[name] != "passed"))
        dist.all_reduce(failed)
        if failed and results[name] == "passed":
            results[name] = "failed on another rank"
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, results)
    if dist.get_rank() == 0:
        (folder / f"results-{len(everyone)}.json").write_text(json.dumps(everyone))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
