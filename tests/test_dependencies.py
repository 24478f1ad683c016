"""What is imported is declared, what is declared is used, and the bounds of versions are those that were tested."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from cluster.providers.aws import AwsProvider
from cluster.providers.azure import AzureProvider
from cluster.providers.gcp import GcpProvider
from docs.generate_reference import PACKAGES, TRIED
from tests.test_locks import PROJECT, ROOT, pins

OWN = ("launcher", "training", "cluster")
EXTRAS = PROJECT["project"]["optional-dependencies"]
DISTRIBUTIONS = packages_distributions() | {
    "azure.core": ["azure-core"],
    "azure.identity": ["azure-identity"],
    "google.auth": ["google-auth"],
}
"""By name of the import. Packages of a namespace share its first name, and those of extras need not be installed."""
NOT_IMPORTED = {
    "s3fs": "fsspec imports it for s3:// addresses",
    "gcsfs": "fsspec imports it for gs:// addresses",
    "bitsandbytes": "transformers imports it for quantized weights",
    "google-api-python-client": "Ray's launcher imports it on Google Cloud",
    "azure-common": "Ray's launcher imports it on Azure",
    "azure-mgmt-compute": "Ray's launcher imports it on Azure",
    "azure-mgmt-network": "Ray's launcher imports it on Azure",
    "azure-mgmt-resource": "Ray's launcher imports it on Azure",
    "msrestazure": "Ray's launcher imports it on Azure",
}


def test_every_import_is_declared_and_everything_declared_is_imported():
    imported = {_distribution(name) for package in OWN for name in _imports(ROOT / package)}
    declared = set(_requirements())
    assert imported - declared == set()
    assert declared - imported == NOT_IMPORTED.keys()


def _requirements() -> dict[str, Requirement]:
    """By normalized name, of everything but the tools of the tests."""
    extras = [line for extra, lines in EXTRAS.items() if extra != "dev" for line in lines]
    return {_normal(each.name): each for each in map(Requirement, [*PROJECT["project"]["dependencies"], *extras])}


def _imports(package: Path) -> Iterator[str]:
    """The third-party modules that the code of a package imports, also within functions."""
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for name in _modules(node):
                if name.partition(".")[0] not in {*sys.stdlib_module_names, *OWN}:
                    yield name


def _modules(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        return [str(node.module)]
    return []


def _distribution(module: str) -> str:
    first, _, rest = module.partition(".")
    known = DISTRIBUTIONS.get(f"{first}.{rest.partition('.')[0]}") or DISTRIBUTIONS.get(first) or [first]
    names = {_normal(name) for name in known}
    assert len(names) == 1, f"{module} may be of {names}: say of which in DISTRIBUTIONS"
    return names.pop()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(("extra", "provider"), [("aws", AwsProvider), ("gcp", GcpProvider), ("azure", AzureProvider)])
def test_an_extra_has_what_ray_needs_to_start_machines_in_that_cloud(extra, provider):
    base = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    assert set(provider.packages.values()) <= base | {Requirement(line).name for line in EXTRAS[extra]}


SETS = yaml.safe_load(TRIED.read_text())


def test_the_newest_tested_set_is_that_of_the_lock():
    assert {name: SETS[-1][name] for name in PACKAGES} == {
        name: version.partition("+")[0] for name, version in pins("cpu").items() if name in PACKAGES
    }
    assert [each["since"] for each in SETS] == sorted(each["since"] for each in SETS)


@pytest.mark.parametrize("name", PACKAGES)
def test_bounds_are_the_oldest_tested_version_and_the_minor_version_after_the_newest(name):
    need = _requirements()[name].specifier
    tested = [Version(each[name]) for each in SETS]
    newest = max(tested)
    assert all(need.contains(version) for version in tested)
    assert {Version(each.version) for each in need if each.operator == "<"} == {
        Version(f"{newest.major}.{newest.minor + 1}")
    }
    (oldest,) = (each.version for each in need if each.operator == ">=")
    assert Version(oldest).release == min(tested).release[: len(Version(oldest).release)]


@pytest.mark.parametrize("package", OWN)
def test_a_package_tells_type_checkers_that_it_is_typed(package):
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]
