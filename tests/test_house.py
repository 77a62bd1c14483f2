"""The rules of the house: what may import what, what an install holds, what is light."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import anyquant
from anyquant.runtime import native

HEAVY = {
    "torch", "transformers", "gguf", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "xllamacpp", "matplotlib",
    "scipy", "huggingface_hub", "joblib", "optuna",
}  # fmt: skip


def imported_by(code: str) -> set[str]:
    """Top-level names in sys.modules after running some code in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n', *sys.modules)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.rsplit("\n", 2)[-2].split()}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports anywhere, but not for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        pending.extend(ast.iter_child_nodes(node))
    return names


def offenders(files: list[Path], banned: set[str]) -> list[str]:
    """Imports of banned packages, or of anything in them."""
    assert files
    return [
        f"{path}: {name}"
        for path in files
        for name in sorted(imports_of(path))
        if any(name == other or name.startswith(other + ".") for other in banned)
    ]


def test_kernels_is_no_package(repository: Path) -> None:
    # On sys.path it would hide Hugging Face's `kernels` package, which transformers imports where it is installed.
    assert (repository / "kernels").is_dir()
    assert not list((repository / "kernels").rglob("__init__.py"))


def test_importing_anyquant_is_light() -> None:
    names = imported_by("import anyquant; anyquant.__version__; dir(anyquant)")
    assert not names & {*HEAVY, "numpy", "click", "rich"}


def test_help_is_light() -> None:
    names = imported_by(
        "import sys\nfrom anyquant.cli import main\nsys.argv = ['anyquant', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert not names & HEAVY


@pytest.mark.parametrize(
    "module", ["anyquant.ir", "anyquant.errors", "anyquant.runtime.native", "anyquant.checkpoint", "anyquant.summary"]
)
def test_light_modules_stay_light(module: str) -> None:
    assert not imported_by(f"import {module}") & HEAVY


def test_unknown_names_are_attribute_errors() -> None:
    assert "load" in dir(anyquant)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        anyquant.lode  # noqa: B018


def test_load_is_the_runtimes() -> None:
    from anyquant import runtime

    assert anyquant.load is runtime.load


def test_the_representation_imports_nothing_of_ours(repository: Path) -> None:
    files = sorted((repository / "anyquant" / "ir").rglob("*.py"))
    ours = {name for path in files for name in imports_of(path) if name.startswith("anyquant.")}
    allowed = ("anyquant.ir", "anyquant.errors")
    assert not {name for name in ours if not name.startswith(allowed)}
    assert not offenders(files, HEAVY)


def test_methods_and_exporters_do_not_know_each_other(repository: Path) -> None:
    assert not offenders(sorted((repository / "anyquant" / "methods").rglob("*.py")), {"anyquant.exporters"})
    assert not offenders(sorted((repository / "exporters").rglob("*.py")), {"anyquant.methods", "exporters"})


def test_reports_stand_on_what_they_share(repository: Path) -> None:
    package = repository / "anyquant"
    reports = {"anyquant.report", "anyquant.sweep"}
    assert not offenders(sorted((package / "reporting").rglob("*.py")), reports | {"anyquant.validation"})
    assert not offenders(sorted((package / "validation").rglob("*.py")), reports)


def test_exporters_are_installed_inside_the_package(repository: Path) -> None:
    from anyquant.exporters import protocol

    assert protocol.__name__ == "anyquant.exporters.protocol"
    assert (repository / "tools/typings/anyquant/exporters").resolve() == (repository / "exporters").resolve()


@pytest.mark.parametrize("group", ["anyquant.exporters", "anyquant.methods"])
def test_every_entry_point_of_ours_loads(group: str, repository: Path) -> None:
    declared = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["entry-points"][group]
    installed = {point.name: point for point in importlib.metadata.entry_points(group=group)}
    assert declared.items() <= {name: point.value for name, point in installed.items()}.items()
    for name in declared:
        assert isinstance(installed[name].load(), type)


def test_versions_agree(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert project["version"] == anyquant.__version__ == importlib.metadata.version("anyquant")


def test_the_header_and_python_agree_on_the_interface(repository: Path) -> None:
    header = (repository / "kernels/core/anyquant_core.h").read_text()
    found = re.search(r"#define AQ_ABI_VERSION (\d+)", header)
    assert found
    assert int(found[1]) == native.ABI_VERSION


def test_test_files_can_be_told_apart(repository: Path) -> None:
    tests = [path for path in (repository / "tests").rglob("*.py")]
    assert not [path for path in tests if path.name == "__init__.py"]
    names = [path.name for path in tests if path.name.startswith("test_")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


@pytest.mark.slow
def test_the_wheel_holds_everything(repository: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        repository, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.so")
    )
    # Without CMake on this machine pip brings one, in an environment of the build's own.
    local = ["--no-build-isolation"] if shutil.which("cmake") else []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *local, "--wheel-dir", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        # What it holds runs: unpacked, and with nothing else of ours in reach.
        archive.extractall(tmp_path / "site")
    expected = {path.relative_to(source).as_posix() for path in (source / "anyquant").rglob("*") if path.is_file()} | {
        f"anyquant/{path.relative_to(source).as_posix()}" for path in (source / "exporters").rglob("*.py")
    }
    expected |= {f"anyquant/_kernels/cuda/{path.name}" for path in (source / "kernels" / "cuda").iterdir()}
    assert expected <= names
    assert "anyquant/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"anyquant", f"anyquant-{anyquant.__version__}.dist-info"}
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler: the wheel is pure Python")
    assert f"anyquant/_lib/{native.LIBRARY}" in names
    assert "-py3-none-" in wheel.name
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        # The finder of an editable install of this package would come first.
        "sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
        "import anyquant, anyquant.exporters.protocol; from anyquant.runtime import native\n"
        "assert anyquant.__file__.startswith(sys.argv[1]), anyquant.__file__\n"
        "assert native.available(), native.why_not()"
    )
    unpacked = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "site"], capture_output=True, text=True, cwd=tmp_path, env=_plain()
    )
    assert unpacked.returncode == 0, unpacked.stderr


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure_python(repository: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        repository, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.so")
    )
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    broken = {**os.environ, "CXX": "/nonexistent/compiler", "CC": "/nonexistent/compiler"}
    done = subprocess.run([*command, "--wheel-dir", tmp_path, source], capture_output=True, text=True, env=broken)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "anyquant/exporters/protocol.py" in names
    assert not [name for name in names if name.endswith(".so")]


def _plain() -> dict[str, str]:
    """The environment without what coverage and the native switch put into it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("COV", "ANYQUANT_"))}
