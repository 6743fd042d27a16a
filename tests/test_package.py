"""The sdist and the wheel hold what they should, and the wheel runs the README's program in a clean environment."""

import email
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

from .test_docs import programs


pytestmark = pytest.mark.full

REPOSITORY = pathlib.Path(__file__).parent.parent
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that was built from it. Nothing is fetched: the builder is part of the extra `test`."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(REPOSITORY))
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_the_wheel_has_the_package_and_nothing_else(built):
    names = set(zipfile.ZipFile(built[1]).namelist())
    package = REPOSITORY / "parallel_diffrax"
    sources = {path.relative_to(REPOSITORY).as_posix() for path in package.rglob("*.py")} | {
        "parallel_diffrax/py.typed"
    }
    info = f"parallel_diffrax-{VERSION}.dist-info"
    assert {name for name in names if not name.startswith(info)} == sources
    assert f"{info}/licenses/LICENSE" in names


def test_the_sdist_has_what_the_tests_and_the_site_need(built):
    names = {name.partition("/")[2] for name in tarfile.open(built[0]).getnames()}
    assert {
        "README.md",
        "mkdocs.yml",
        "docs/index.md",
        "tests/problems.py",
        "benchmarks/results/regimes_gpu.json",
    } <= names
    assert not [name for name in names if name.startswith((".exp", ".venv", "site/", "shared"))]


def test_the_page_of_the_package_has_a_version_classifiers_and_no_relative_link(built):
    wheel = zipfile.ZipFile(built[1])
    text = wheel.read(f"parallel_diffrax-{VERSION}.dist-info/METADATA").decode()
    metadata = email.message_from_string(text)
    assert metadata["Version"] == VERSION and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert {"cuda", "docs", "examples", "test", "warp"} <= set(metadata.get_all("Provides-Extra"))
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    description = metadata.get_payload()
    assert "## A whole program" in description and "arxiv.org" in description
    assert not re.search(r"\]\((?!https?:)", description)


def test_version_and_date_agree_everywhere():
    citation, changelog = ((REPOSITORY / name).read_text() for name in ("CITATION.cff", "CHANGELOG.md"))
    (date,) = re.findall(r'^date-released: "(.*)"$', citation, re.MULTILINE)
    assert f"version: {VERSION}\n" in citation and f"## [{VERSION}] - {date}\n" in changelog


def test_the_wheel_runs_the_program_of_the_readme_in_a_clean_environment(built, tmp_path):
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    # The versions of this environment, so that nothing else is fetched than what was fetched for it.
    constraints = tmp_path / "constraints.txt"
    versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    versions.pop("parallel_diffrax")
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--constraint", str(constraints), str(built[1]))
    program = "".join(body for language, body in programs("README.md") if language == "python")
    path = tmp_path / "program.py"
    path.write_text(program + "print(pdx.__file__)\n")
    # As users run it: without the flags and settings of the suite.
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
    out = run(python, "-I", str(path), cwd=tmp_path, env=environment)
    assert "parallel_steps: " in out and "choice: in parallel" in out
    assert out.splitlines()[-1].startswith(str(tmp_path / "venv"))
