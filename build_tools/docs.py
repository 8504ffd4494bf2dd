# SPDX-License-Identifier: Apache-2.0
"""Hook of mkdocs: links from pages to files of the repository lead to copies inside the site."""

from __future__ import annotations

import re
from pathlib import Path

_LINK = re.compile(r"\]\(((?:\.\./)+)((?!https?:)[^)#]+)\)")


def outside(page: str, text: str, docs: Path) -> dict[str, Path]:
    """Targets of a page's links that lie beside the folder of pages, by the text of the link."""
    found = {}
    for up, rest in _LINK.findall(text):
        target = (docs / page).parent.joinpath(up + rest).resolve()
        if not target.is_relative_to(docs) and target.is_file():
            found[up + rest] = target
    return found


def on_files(files, config):
    from mkdocs.structure.files import File

    docs = Path(config.docs_dir)
    for file in [f for f in files if f.is_documentation_page()]:
        for target in outside(file.src_uri, Path(file.abs_src_path).read_text(), docs).values():
            copy = f"files/{target.relative_to(docs.parent)}.txt".replace(".svg.txt", ".svg")
            if files.get_file_from_path(copy) is None:
                files.append(File.generated(config, copy, content=target.read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    docs, up = Path(config.docs_dir), "../" * page.file.src_uri.count("/")
    for link, target in outside(page.file.src_uri, markdown, docs).items():
        copy = f"files/{target.relative_to(docs.parent)}.txt".replace(".svg.txt", ".svg")
        markdown = markdown.replace(f"]({link})", f"]({up}{copy})")
    return markdown


_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code>)")


def on_page_content(html, page, config, files):
    """What docstrings write for other readers: roles before code, two colons before a block."""
    return _ROLE.sub("", html).replace("::</p>", ":</p>")
