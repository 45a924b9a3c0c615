"""Pages of the site that are not in docs/: those from the repository's root, the tutorials, and the reference of all modules.

Links of pages are written for readers of the repository; here those that leave docs/ are led to the pages of the site: a
Markdown file to its page, a module to its place in the reference, any other file to its name alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
COPY = ROOT / "build" / "docs"
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Files of the repository that are pages of the site."""

NOTEBOOKS = ROOT / "docs" / "tutorials"
FLOORS = ("engine", "models", "kernels")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def rooms() -> dict[str, list[str]]:
    """Modules by folder, all that a reader may import; the folders in the order of the tree."""
    found: dict[str, list[str]] = {}
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            place = path.relative_to(ROOT)
            if "remote" not in place.parts and not path.stem.startswith("_"):
                found.setdefault(place.parent.as_posix(), []).append(place.with_suffix("").as_posix().replace("/", "."))
    return found


def on_startup(**_: Any) -> None:
    """Copy the modules to where the reference reads them: it follows no links, and passes over folders without __init__.py."""
    if not with_reference():
        return
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(ROOT / "armillary", COPY / "armillary", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for folder in (COPY / "armillary").rglob("*/"):
        (folder / "__init__.py").touch()


def on_config(config: Any) -> Any:
    """Put the reference behind the pages that mkdocs.yml names; ARMILLARY_DOCS=pages leaves it out, which is quicker."""
    if with_reference():
        config.nav.append({"Reference": [{room: reference_page(room)} for room in rooms()]})
    return config


def with_reference() -> bool:
    """Whether the reference is built."""
    return os.environ.get("ARMILLARY_DOCS") != "pages"


def on_files(files: Any, config: Any) -> Any:
    """Add what is not in docs/."""
    pages = {page: (ROOT / source).read_text() for source, page in OUTSIDE.items()}
    if with_reference():
        for room, modules in rooms().items():
            text = "\n".join(f"::: armillary.{module}\n" for module in modules)
            pages[reference_page(room)] = f"# {room}\n\n{text}"
    pages |= {f"tutorials/{path.stem}.md": notebook_page(path) for path in NOTEBOOKS.glob("*.ipynb")}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def notebook_page(path: Path) -> str:
    """A notebook's cells as Markdown: code as blocks, without outputs; the notebook itself is beside the page."""
    cells = ((cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"])
    text = "\n\n".join(source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells)
    return f'{text}\n\n<a href="{path.name}" download>The notebook</a>\n'


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead the links of a page to pages of the site."""
    uri = page.file.src_uri
    source = next((source for source, made in OUTSIDE.items() if made == uri), f"docs/{uri}")
    top = "../" * uri.count("/")

    def led(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        place = Path(os.path.normpath(PurePosixPath(source).parent / target)).as_posix()
        if place in OUTSIDE:
            return f"[{text}]({top}{OUTSIDE[place]}{anchor})"
        if place.startswith("docs/"):
            inside = place.removeprefix("docs/").replace(".ipynb", ".md")  # a notebook's page
            return f"[{text}]({top}{inside}{anchor})"
        folder, name = (
            str(PurePosixPath(place).parent),
            PurePosixPath(place).with_suffix("").as_posix().replace("/", "."),
        )
        if with_reference() and name in rooms().get(folder, ()):
            return f"[{text}]({top}{reference_page(folder)}#armillary.{name})"
        return text

    return markdown if uri.startswith("reference/") else LINK.sub(led, markdown)


def reference_page(room: str) -> str:
    """The page of a folder's modules."""
    return f"reference/{room.replace('/', '.')}.md"
