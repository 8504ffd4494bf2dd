# SPDX-License-Identifier: Apache-2.0
"""What to build and with which flags. Pure functions; ``setup.py`` calls them and ``tests/packaging`` tests them."""
