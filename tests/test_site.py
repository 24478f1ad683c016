"""The README stays short, links and anchors of all Markdown files resolve, every page is on the site,
and jobs in the docs are valid."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from launcher.jobfile import job

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1`*\s*$", re.MULTILINE | re.DOTALL)


def markdown_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in listed.stdout.split() if (path := ROOT / name).exists()]


@cache
def text_of(page: Path) -> str:
    """The page without its blocks of code."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and the site (pymdownx.slugs) derive them."""
    headings = re.findall(r"^#+ +(.+?) *$", text_of(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    links = LINK.findall(re.sub(r"`[^`\n]*`", "", text_of(page)))
    return [link for link in links if not re.match(r"[a-z]+:", link) and not resolves(page, link)]


def resolves(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    return target.exists() and (not anchor or anchor in anchors(target))


def missing_files(page: Path) -> list[str]:
    """Files of the repository that the page names and that do not exist. The folder of a test may be left out."""
    paths = re.findall(r"`((?:launcher|training|benchmarks|configs|\.ci)/[\w./-]+\.\w+)`", text_of(page))
    tests = re.findall(r"`([\w/]*\btest_\w+\.py)`", text_of(page))
    missing = [path for path in paths if "test_" not in path and not (ROOT / path).exists()]
    return missing + [name for name in tests if not any(file.endswith(f"/{name}") for file in files_of_tests())]


@cache
def files_of_tests() -> list[str]:
    return [path.as_posix() for path in (ROOT / "tests").rglob("test_*.py")]


def pages_of(nav) -> set[str]:
    """Pages that a part of `nav` names; a folder stands for all pages in it."""
    if isinstance(nav, str):
        return {nav} if nav.endswith(".md") else {f"{nav}{page.name}" for page in (DOCS / nav).glob("*.md")}
    return set().union(*map(pages_of, nav.values() if isinstance(nav, dict) else nav))


def jobs_in_docs():
    for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            if {"name", "model", "phases"} <= set(yaml.safe_load(block)):
                yield pytest.param(block, id=page.stem)


def test_the_readme_has_at_most_200_lines_of_120_columns():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("page", markdown_files(), ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_and_anchors_resolve(page):
    assert broken_links(page) == []


def test_files_that_the_docs_name_exist():
    assert {
        page.name: found for page in markdown_files() if page.is_relative_to(DOCS) and (found := missing_files(page))
    } == {}


def test_every_page_of_docs_is_in_the_navigation():
    config = yaml.safe_load((DOCS / "site/mkdocs.yml").read_text(encoding="utf-8"))
    pages = {str(page.relative_to(DOCS)) for page in markdown_files() if page.is_relative_to(DOCS)}
    assert pages_of(config["nav"]) == pages


@pytest.mark.parametrize("block", jobs_in_docs())
def test_a_job_in_the_docs_is_valid(block, tmp_path):
    for name in re.findall(r"data/[\w.]+\.jsonl", block):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "1+1", "completion": "2"}\n')
    (tmp_path / "job.yaml").write_text(block)
    assert job.load(tmp_path / "job.yaml").phases
