"""What MkDocs needs besides its settings: anchors as on GitHub, folders in `nav`, links out of docs/,
scripts for offline use."""

from __future__ import annotations

import logging
import posixpath
import re
import shutil
from importlib.resources import files
from pathlib import Path

import mermaidx
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify
from pymdownx.superfences import fence_code_format

_LOG = logging.getLogger("mkdocs.hooks.diagrams")  # with --strict a warning ends the build
_DIAGRAM = re.compile(r"^```mermaid\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)\s]*)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    fence = {"name": "mermaid", "class": "mermaid", "format": fence_code_format}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    config.nav = _expanded(config.nav, Path(config.docs_dir))
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """A link to a file outside of docs/ leads to the repository; where `repo_url` is not set,
    it becomes the file's path."""
    for diagram in _DIAGRAM.findall(markdown):
        _check_diagram(diagram, page.file.src_uri)
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def outside(link: re.Match[str]) -> str:
        text, target = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
        if path.startswith("docs/"):
            return link[0]
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})" if config.repo_url else f"{text} (`{path}`)"

    return _LINK.sub(outside, markdown)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """The theme would fetch Mermaid from a CDN unless the page has loaded it."""
    if 'class="mermaid"' not in html:
        return html
    root = posixpath.relpath(".", posixpath.dirname(page.url) or ".")
    return f'<script src="{root}/assets/mermaid.js"></script>\n{html}'


def on_post_build(config: MkDocsConfig) -> None:
    assets = Path(config.site_dir, "assets")
    shutil.copy(str(files("mermaidx") / "assets/mermaid.js"), assets / "mermaid.js")
    shutil.copy(Path(__file__).with_name("worker_from_disk.js"), assets / "iframe-worker.js")


def _check_diagram(diagram: str, page: str) -> None:
    try:
        mermaidx.render(diagram).svg()
    except RuntimeError as error:
        _LOG.warning("%s: a diagram is not valid: %s", page, error)


def _expanded(nav: list, docs: Path) -> list:
    """`nav` with the pages of each folder that it names, a path that ends with a slash."""
    entries = []
    for entry in nav:
        (title, value) = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(value, list):
            entries.append({title: _expanded(value, docs)})
        elif value.endswith("/"):
            pages = sorted(page.relative_to(docs).as_posix() for page in (docs / value).glob("*.md"))
            entries += [{title: pages}] if title else pages
        else:
            entries.append(entry)
    return entries
