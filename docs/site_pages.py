"""MkDocs' hook: README.md is the site's front page, decisions are listed, other links lead to the repository.

Pages are written for whoever reads them in the repository, so they link to source files that the site does not hold.
Where the repository's address is known (GitHub sets it in its workflows) such a link leads there; elsewhere only its
text stays.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")


def repository() -> str | None:
    """Address that a path in the repository is appended to; None where it is not known."""
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    return f"{server}/{name}/blob/main/" if server and name else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md as index.md, its links relative to docs/, and a page that lists the decisions."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\((?!https?://|#)([^)\s]+)\)", lambda link: f"]({posixpath.relpath(link[1], 'docs')})", text)
    files.append(File.generated(config, "index.md", content=text))
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    titles = [page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for page in pages]
    listed = [f"* [{title}]({page.name})" for title, page in zip(titles, pages, strict=True)]
    files.append(
        File.generated(config, "decisions/index.md", content="\n".join(["# Decisions and their reasons", "", *listed]))
    )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to what the site does not hold."""
    folder = posixpath.dirname(page.file.src_uri)

    def replaced(link: re.Match[str]) -> str:
        text, target = link[1], link[2]
        path, _, anchor = target.partition("#")
        inside = posixpath.normpath(posixpath.join(folder, path))
        if files.get_file_from_path(inside):
            return link[0]
        index = posixpath.join(inside, "index.md")
        if files.get_file_from_path(index):
            return f"[{text}]({posixpath.relpath(index, folder or '.')})"
        address = repository()
        in_repository = posixpath.normpath(posixpath.join("docs", inside))
        return f"[{text}]({address}{in_repository}{'#' * bool(anchor)}{anchor})" if address else text

    return LINK.sub(replaced, markdown)
