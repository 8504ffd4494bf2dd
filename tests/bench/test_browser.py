# SPDX-License-Identifier: Apache-2.0
"""The page in a browser: every figure is drawn, tables sort by value, nothing is asked of the network."""

import re
import shutil
import subprocess

import pytest
import torch

from fastflat.cli import bench

pytest.importorskip("plotly", reason="pip install 'fastflat[bench]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--timeout=20000"),
)

#: Clicks the head of the sixth column, a step's time, twice and tells what stood there; runs behind the page's script.
PROBE = """<script>
const column = () => [...document.querySelectorAll("table")[0].tBodies[0].rows].map(r => r.cells[5].textContent);
const told = [], head = document.querySelectorAll("table")[0].tHead.rows[0].cells[5];
head.click(); told.push(column().join("|")); head.click(); told.push(column().join("|"));
const asked = performance.getEntriesByType("resource").length;
document.title = `told ${told.join(" then ")}; asked ${asked}`;
</script>"""


def page(benchmarks):
    """A record with times in three units, drawn."""
    facts = benchmarks.machine.describe(torch.device("cpu"))
    case = {
        "family": "step",
        "threads": 1,
        "network": "net",
        "mode": "eager",
        "optimizer": "sgd",
        "batch": 4,
        "bits": 4,
    }
    rows = [
        {**case, "network": f"net{n}", "peer": "fastflat", "seconds": s, "q1": s * 0.9, "q3": s * 1.1, "best": s,
         "samples_per_second": 4 / s, "rounds": 3, "calls": 1, "overhead": None, "of_identity": None,
         "peak_bytes": 1000}
        for n, s in enumerate((2.0, 30e-6, 4e-3))
    ]  # fmt: skip
    result = {"format": 1, "benchmark": "step", "machine": facts, "device": "cpu", "allocator": "default", "rows": rows}
    return bench.package("page").html(result)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_figures_are_drawn_and_tables_sort(tmp_path, benchmarks):
    text = page(benchmarks)
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>\n</html>", f"{PROBE}</body>\n</html>"))
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    dom = done.stdout
    title = re.search(r"<title>(.*?)</title>", dom)[1]
    assert title == "told 30 us|4 ms|2 s then 2 s|4 ms|30 us; asked 0"
    figures = re.findall(r'<figure id="([\w-]+)"[^>]*class="([^"]*)"', dom)
    assert len(figures) == text.count('type="application/json"') >= 2
    assert all("js-plotly-plot" in classes for _, classes in figures)
    assert dom.count("xtitle") >= len(figures)
