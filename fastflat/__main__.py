# SPDX-License-Identifier: Apache-2.0
"""``python -m fastflat``: the same as the command ``fastflat``."""

from fastflat.cli import main

if __name__ == "__main__":
    main()
