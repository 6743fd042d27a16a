"""Public docstrings agree with the code: the arguments they list, the names in their programs, the files that they cite."""

import ast
import inspect
import pathlib
import re

import pytest

import parallel_diffrax as pdx

from .test_docs import public_names


REPOSITORY = pathlib.Path(__file__).parent.parent


def resolve(name):
    found = pdx
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


NAMES = {name: resolve(name) for name in public_names()}


def section(doc, title):
    """The text of one `**Title:**`, up to the next."""
    found = re.search(rf"^\*\*{title}[^*]*:?\*\*:?(.*?)(?=^\*\*[A-Z]|^\?\?\?|\Z)", doc, re.DOTALL | re.MULTILINE)
    return None if found is None else found.group(1)


def parameters(value):
    return [name for name in inspect.signature(value).parameters if not name.startswith("_")]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_documented_arguments_are_those_of_the_call(name):
    value = NAMES[name]
    text = section(inspect.getdoc(value), "Arguments")
    if text is None or inspect.isabstract(value):
        return
    listed = re.findall(r"^- ((?:`\w+`(?:, )?)+):", text, re.MULTILINE)
    found = [n for group in listed for n in re.findall(r"`(\w+)`", group)]
    if found:
        assert sorted(found) == sorted(parameters(value))
    elif not re.search(r"\bas (for|in|`diffrax)", text):
        # In prose: every argument is named.
        assert set(parameters(value)) <= set(re.findall(r"`(\w+)`", text))


def blocks(doc):
    return re.findall(r"^( *)```python\n(.*?)^\1```", doc, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_programs_in_docstrings_use_names_that_exist(name):
    for _, body in blocks(inspect.getdoc(NAMES[name])):
        tree = ast.parse(inspect.cleandoc(body).replace("...,", "").replace("(...)", "()"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.fullmatch(r"pdx(\.\w+)+", text := ast.unparse(node)):
                resolve(text)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_files_that_docstrings_cite_exist(name):
    for path in re.findall(r"`((?:benchmarks|examples|tests)/[\w/]+\.\w+)`", inspect.getdoc(NAMES[name])):
        assert (REPOSITORY / path).exists(), path
