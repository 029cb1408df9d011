"""What mkdocs.yml calls while the site is built: pages that lie elsewhere, and links that lead elsewhere.

README, changelog and contributing become pages, every module gets one in the reference, and links that
are right in the repository are made right in the site. What is not part of the site keeps its text and loses its link.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
PACKAGES = {
    "d2v_core": "d2v_core",
    "d2v_audio": "modalities/audio/d2v_audio",
    "d2v_text": "modalities/text/d2v_text",
    "d2v_vision": "modalities/vision/d2v_vision",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def modules() -> Iterator[tuple[str, str]]:
    """(dotted name, path in the repository) of every module that is meant to be read."""
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            below = path.relative_to(ROOT / folder)
            if "template" in below.parts or path.name == "__main__.py":
                continue
            parts = [package, *below.with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.relative_to(ROOT).as_posix()


def page_of(module: str) -> str:
    return f"reference/{module.replace('.', '/')}.md"


def on_config(config: Any) -> Any:
    """Pages that mkdocs.yml does not list, and the reference, a section for each package, end the navigation."""
    listed = set(re.findall(r"[\w./-]+\.md", str(config.nav)))
    more = sorted({path.name for path in (ROOT / "docs").glob("*.md")} - listed)
    if more:
        config.nav.append({"More": more})
    found = [name for name, _ in modules()]
    config.nav.append({
        "Reference": [
            {package: [{name: page_of(name)} for name in found if name.split(".")[0] == package]}
            for package in PACKAGES
        ]
    })  # fmt: skip
    return config


def on_files(files: Files, config: Any) -> Files:
    """Pages that are made, or lie outside of docs/."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, _ in modules():
        files.append(File.generated(config, page_of(name), content=f"# {name}\n\n::: {name}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are right in the repository -> as they are right in the site. Code stays as it is."""
    del config
    here = page.file.src_uri
    source = next((path for path, name in ELSEWHERE.items() if name == here), f"docs/{here}")
    pages = {path: page_of(name) for name, path in modules()} | ELSEWHERE

    def rewritten(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if re.match(r"\w+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        meant = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        found = pages.get(meant, meant.removeprefix("docs/"))
        if files.get_file_from_path(found) is None:
            return text
        return f"{image}[{text}]({posixpath.relpath(found, posixpath.dirname(here) or '.')}{hash_}{anchor})"

    pieces = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(piece if i % 2 else LINK.sub(rewritten, piece) for i, piece in enumerate(pieces))
