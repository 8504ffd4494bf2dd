# SPDX-License-Identifier: Apache-2.0
"""A small data set that can be learned, and the command run in this process."""

import numpy as np
import pytest
import torch

from fastflat.cli import main


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bars(tmp_path_factory):
    """An .npz of noisy 12x12 images: a bright bar at one of four places."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 480)
    x = rng.integers(0, 60, (480, 12, 12))
    for image, label in zip(x, y, strict=True):
        image[3 * label : 3 * label + 2] += 150
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    np.savez(path, x_train=x[:384].astype(np.uint8), y_train=y[:384], x_test=x[384:].astype(np.uint8), y_test=y[384:])
    return path


@pytest.fixture
def command(capsys):
    """Runs ``fastflat``; gives (exit status, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out = capsys.readouterr()
        return stop.value.code, out.out, out.err

    return run


@pytest.fixture
def train(command, bars):
    """``fastflat train`` on the bars, small."""

    def run(*arguments):
        return command("train", "--data", bars, "--no-mirror", "--batch", 32, *arguments)

    return run
