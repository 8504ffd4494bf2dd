# SPDX-License-Identifier: Apache-2.0
"""The command ``fastflat``. Subcommands are imported when they run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

#: Subcommands: each is the click command of the same name in the module of the same name.
COMMANDS = {
    "allocate": "choose the bits of each layer from its curvature, for a budget",
    "audit": "check compiled GPU kernels against their budget, without a GPU",
    "bench": "measure throughput side by side with other implementations",
    "doctor": "show what is built, and which backend computes what, and why",
    "export": "write a network as integer codes: ONNX, torch.export, torchao, safetensors",
    "methods": "published methods: check their equations, test their claims, report",
    "spectrum": "show eigenvalues, trace and density of a trained network's curvature",
    "train": "train a low-bit network on real images; --demo compares three quantizers",
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Bad input ends with exit status 2 and one line; ``--traceback`` shows where it was noticed."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    traceback = os.environ.get("FASTFLAT_TRACEBACK") == "1" or "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"] or ["--help"]
    try:
        import click
    except ImportError:
        sys.exit("fastflat: the commands need click; pip install click")
    try:
        sys.exit(_group(click).main(arguments, prog_name="fastflat", standalone_mode=False) or 0)
    except click.ClickException as error:
        if traceback:
            raise
        _fail(error.format_message())
    except (ValueError, TypeError, OSError, ImportError) as error:
        if traceback:
            raise
        _fail(str(error) or type(error).__name__)
    except (KeyboardInterrupt, click.Abort):  # Abort is a RuntimeError
        if traceback:
            raise
        print("fastflat: interrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        # Ours say how to mend things (no scale yet, FASTFLAT_STRICT); any other is a defect and shows where.
        if traceback or not str(error).startswith("fastflat"):
            raise
        _fail(str(error))


def _fail(message: str) -> None:
    line = " ".join(message.split()).removeprefix("fastflat: ").removeprefix("fastflat::")
    print(f"fastflat: {line}", file=sys.stderr)
    sys.exit(2)


def _group(click):
    class Lazy(click.Group):
        """Knows the names and one-line helps of the subcommands; imports the one that runs."""

        def list_commands(self, ctx) -> list[str]:
            return [name for name in COMMANDS if importlib.util.find_spec(f"fastflat.cli.{name}")]

        def get_command(self, ctx, name: str):
            if name not in self.list_commands(ctx):
                return None
            return getattr(importlib.import_module(f"fastflat.cli.{name}"), name)

        def format_commands(self, ctx, formatter) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])

    @click.command(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
    @click.version_option(package_name="fastflat", version=_version(), message="%(prog)s %(version)s")
    @click.option("--traceback", is_flag=True, help="On an error show where it happened, too.")
    def group(traceback: bool) -> None:
        """Fused kernels for low-bit, flatness-seeking training.

        \b
        Examples:
          fastflat doctor
          fastflat train --demo
          fastflat train --data photos/ --model resnet20 --weight-bits 4 --activation-bits 4
        """

    return group


def _version() -> str:
    import fastflat

    return fastflat.__version__
