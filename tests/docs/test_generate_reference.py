"""The reference pages are what the code says, and leave nothing out."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.spec import SPECS
from docs import generate_reference
from launcher.driver.retry_policy import Incident
from launcher.jobfile.job import TopLevel
from launcher.runfolder.event_schema import COMMON, EVENTS, OF_A_PHASE
from launcher.workers.errors import Kind
from training.recipes import RECIPES

ROOT = Path(__file__).parents[2]
CODE = [file for package in ("launcher", "training", "cluster") for file in sorted((ROOT / package).rglob("*.py"))]
SET_BY_MUSTER = {"MUSTER_MODEL_TRAITS", "MUSTER_ENV", "MUSTER_SEALED", "MUSTER_CLUSTER", "MUSTER_FORK_SERVER"}
"""Variables that one process of Muster sets for another."""


@pytest.mark.parametrize("name", generate_reference.pages())
def test_the_committed_page_is_what_the_code_gives(name):
    committed = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert committed == generate_reference.pages()[name], "run `make docs`"


SETTINGS = {"job": TopLevel, **{name: recipe.config for name, recipe in RECIPES.items()}, **SPECS}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_is_without_a_meaning(name):
    bare = [row.key for row in generate_reference.rows_of(SETTINGS[name], {}) if not (row.meaning and row.takes)]
    assert bare == []


def test_every_command_and_option_is_there_with_its_meaning():
    page, verbs = generate_reference.pages()["commands.md"], generate_reference.verbs()
    assert {"init", "run", "plan", "critique", "cluster up"} <= verbs.keys()
    for name, verb in verbs.items():
        assert f"### `muster {name}`\n\n{verb.help}" in page
        assert "".join(f"    {line}\n" for line in verb.epilog.splitlines()) in page
        for each in verb.params:
            assert each.help, f"{name} {each.opts[0]}"


def test_every_environment_variable_that_is_read_is_there():
    read = set()
    for file in CODE:
        text = file.read_text()
        read |= set(re.findall(r"""environ(?:\.get\(|\.pop\(|\[)"([A-Z_]+)"(?!\] =)""", text))
        read |= set(re.findall(r'"([A-Z_]+)" (?:not )?in os\.environ', text))
        read |= set(re.findall(r'"(MUSTER_[A-Z_]+)"', text))
    assert read - SET_BY_MUSTER - {"MUSTER_"} - _assigned() <= generate_reference.ENVIRONMENT.keys()
    assert generate_reference.ENVIRONMENT.keys() <= read


def _assigned() -> set[str]:
    return {name for file in CODE for name in re.findall(r'environ\["([A-Z_]+)"\] =', file.read_text())} - {
        "NO_PROXY",
        "CUDA_VISIBLE_DEVICES",
    }


def _events() -> Iterator[tuple[str, str, set[str]]]:
    """Where an event is written down, which, and what is said of it by name."""
    for file in CODE:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "event":
                kinds = [each.value for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)]
                said = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
                for kind in kinds:
                    yield f"{file.name}:{node.lineno}", kind, said


def test_every_event_in_the_code_is_there_with_what_it_says():
    known = {name: {*event.fields, *(OF_A_PHASE if event.of_phase else ())} for name, event in EVENTS.items()}
    found = list(_events())
    assert {kind for _, kind, _ in found} == known.keys()
    assert [where for where, kind, said in found if not said <= known[kind]] == []
    assert not COMMON.keys() & {fact for fields in known.values() for fact in fields}


def test_an_incident_says_what_the_page_says():
    fields = Incident(Kind.KILLED, "m", step=1, checkpoint=0).fields()
    assert {*fields, "retry", "why", "skip"} == EVENTS["incident"].fields.keys()


def test_the_guide_to_failures_knows_every_class():
    page = (ROOT / "docs" / "failures.md").read_text()
    assert [kind for kind in Kind if f"`{kind}`" not in page] == []


def test_every_link_between_documents_leads_somewhere():
    for page in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
