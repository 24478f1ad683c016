"""Who may import whom, and what must not be loaded to answer quickly."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("launcher", "training", "cluster")
FORBIDDEN = {
    "training": {"launcher", "cluster", "ray"},
    "cluster": {"launcher", "training", "torch"},
    "launcher": set(),
}
RAY = {
    f"launcher/{name}.py"
    for name in (
        "workers/actor", "workers/ray_session", "workers/placement", "workers/ray_compat", "workers/worker_group",
        "workers/watchdog",
        "submit/ray_jobs",
    )
}  # fmt: skip
"""Modules of launcher that know Ray."""
HEAVY = ("torch", "ray", "deepspeed", "transformers", "datasets", "tensorboard", "pyarrow")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Top-level names of all imports in a file, also of those inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_downwards(package):
    for file in sources(package):
        assert not FORBIDDEN[package] & set(imported(file)), file


def test_the_scan_sees_imports_inside_functions():
    assert {"rich", "typer", "training"} <= set(imported(ROOT / "launcher" / "cli" / "common.py"))


@pytest.mark.parametrize(
    ("library", "files"),
    [
        ("deepspeed", {"training/engine/engine.py", "training/engine/deepspeed_compat.py"}),
        ("ray", RAY | {"cluster/providers/cloud.py", "cluster/providers/ray_launcher_compat.py"}),
    ],
)
def test_a_library_is_known_in_few_files(library, files):
    users = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in sources(package)
        if library in imported(file)
    }
    assert users == files


def names_the_accelerator(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=str(text)):
            return text.partition(":")[0] == "cuda"
        case ast.Attribute(value=ast.Name("torch"), attr="cuda"):
            return True
        case ast.ImportFrom(module="torch", names=names):
            return "cuda" in [alias.name for alias in names]
        case ast.ImportFrom(module=str(module)):
            return module.startswith("torch.cuda")
        case ast.Import(names=names):
            return any(alias.name.startswith("torch.cuda") for alias in names)
    return False


def test_one_file_names_the_accelerator():
    files = {
        file.relative_to(ROOT).as_posix()
        for package in ("launcher", "training")
        for file in sources(package)
        if any(map(names_the_accelerator, ast.walk(ast.parse(file.read_text()))))
    }
    assert files == {"training/device.py"}


@pytest.mark.parametrize(
    "code",
    ["d = 'cuda'", "d = f'cuda:{0}'", "torch.cuda.synchronize()", "from torch import cuda", "import torch.cuda.nccl"],
)
def test_the_scan_sees_the_accelerator(code):
    assert any(map(names_the_accelerator, ast.walk(ast.parse(code))))


def private_imports(file: Path) -> Iterator[str]:
    """Modules and names with an underscore that a file imports from other libraries."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] not in PACKAGES:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name for name in names if "._" in name and not name.startswith("__future__"))


def test_private_names_of_other_libraries_are_imported_in_compat_modules_only():
    users = {file for package in PACKAGES for file in sources(package) if any(private_imports(file))}
    assert users
    assert [file for file in users if not file.stem.endswith("_compat")] == []


def test_few_files_speak_to_actors():
    callers = [
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in sources(package)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "remote"
    ]
    assert set(callers) == {f"launcher/workers/{name}.py" for name in ("placement", "worker_group", "watchdog")}


def test_every_file_says_what_it_is():
    for package in PACKAGES:
        for file in sources(package):
            text = file.read_text()
            assert not text.strip() or ast.get_docstring(ast.parse(text)), file


def test_the_packages_are_those_of_the_import_contracts():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert tuple(settings["tool"]["importlinter"]["root_packages"]) == PACKAGES


def loaded_after(code: str, folder: Path) -> set[str]:
    """The heavy libraries that are loaded after the code ran in a fresh interpreter."""
    report = f"import sys; print('|'.join(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], cwd=folder, capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split("|")) - {""}


@pytest.mark.parametrize(
    "module",
    [
        "launcher.cli.main",
        "launcher.driver.check",
        "launcher.runfolder.run_folder",
        "launcher.report.status",
        "training.config",
    ],
)
def test_looking_at_jobs_and_runs_loads_nothing_heavy(module):
    assert loaded_after(f"import {module}", ROOT) == set()


def test_the_drivers_of_recipes_load_no_torch():
    """It would take seconds before the first step. That of PPO computes with it."""
    code = (
        "from training.recipes import RECIPES, resolve\n"
        "for name, recipe in RECIPES.items():\n    if name != 'ppo': resolve(recipe.run)"
    )
    assert loaded_after(code, ROOT) & {"torch", "ray", "deepspeed", "transformers"} == set()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_loads_nothing_heavy_and_writes_no_file(tmp_path, shell):
    """The shell runs the command at every press of the key."""
    words = {"COMP_WORDS": "muster res", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "muster res"}
    asked = {**words, "_TYPER_COMPLETE_FISH_ACTION": "get-args", "_MUSTER_COMPLETE": f"complete_{shell}"}
    code = (
        f"import os, sys\nos.environ.update({asked | {'HOME': str(tmp_path)}!r})\nsys.argv = ['muster']\n"
        "from launcher.__main__ import main\ntry: main()\nexcept SystemExit as end: assert not end.code"
    )
    assert loaded_after(code, ROOT) == set()
    assert list(tmp_path.iterdir()) == []


def verb(*arguments: str) -> str:
    return (
        f"from launcher.cli.main import app\ntry: app({arguments!r})\nexcept SystemExit as end: assert not end.code, "
        "end.code"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "job.yaml", "phases.sft.data.train=openai/gsm8k", "phases.sft.data.eval=null"),
        ("list",),
    ],
    ids=" ".join,
)
def test_verbs_that_read_no_rows_load_nothing_heavy(place, arguments):
    assert loaded_after(verb(*arguments), place) == set()


def test_the_check_of_rows_with_a_tokenizer_on_the_hub_loads_nothing_heavy(place):
    assert loaded_after(verb("check", "job.yaml", "model.path=org/model"), place) <= {"pyarrow"}


@pytest.mark.cpu
def test_check_never_loads_ray_or_deepspeed(place):
    assert not {"ray", "deepspeed"} & loaded_after(verb("check", "job.yaml"), place)
