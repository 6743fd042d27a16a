"""What README and site say holds: their programs run and print what stands below them, every public name has its place in
the reference, every message that the FAQ quotes is one that the code has, every row of the page for users of Diffrax is
tested, and the table of speed is that of the results.

`python -m tests.test_docs` writes the table anew.
"""

import ast
import contextlib
import inspect
import io
import json
import pathlib
import re
import sys

import pytest

import parallel_diffrax as pdx

from .problems import only_full


REPOSITORY = pathlib.Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
# A fenced block: its indentation, its language, its lines.
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
# Languages that are not run. `text` after a program is what it prints.
OTHER = {"bash", "diff", "text", "toml", "yaml"}
PAGES = sorted(path.relative_to(REPOSITORY).as_posix() for path in [REPOSITORY / "README.md", *DOCS.rglob("*.md")])
# Pages that every run of the suite covers. The others repeat the claim.
FIRST = ("README.md", "docs/from_diffrax.md")


def blocks(page):
    """The language and the text of every fenced block of a page, in order."""
    text = (REPOSITORY / page).read_text()
    for indent, language, body in BLOCK.findall(text):
        yield language, "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))


def programs(page):
    return [(language, body) for language, body in blocks(page) if language in ("python", "text")]


WITH_PROGRAMS = [page for page in PAGES if any(language == "python" for language, _ in programs(page))]


@pytest.mark.parametrize("page", [p if p in FIRST else only_full(p)[0] for p in WITH_PROGRAMS])
def test_the_programs_of_a_page_run_in_order_and_print_what_stands_below_them(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    printed = None
    for language, body in programs(page):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(body, page, "exec"), names)
            printed = out.getvalue()
        elif printed is not None:
            assert printed.split() == body.split(), f"{page} prints\n{printed}"
            printed = None


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_and_fences_are_closed(page):
    found = {language for language, _ in blocks(page)}
    assert found <= OTHER | {"python"}, found
    assert (REPOSITORY / page).read_text().count("```") == 2 * len(list(blocks(page)))


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 120


def public_names():
    """The dotted names of all that is public."""
    modules = [m for m in vars(pdx).values() if inspect.ismodule(m)]
    namespaces = [m for m in modules if m.__name__.startswith(f"{pdx.__name__}.") and "._" not in m.__name__]
    for module in (pdx, *namespaces):
        for name, value in vars(module).items():
            if not name.startswith("_") and not inspect.ismodule(value):
                yield f"{module.__name__}.{name}"


def test_every_public_name_is_in_the_reference_once():
    pages = [path.read_text() for path in (DOCS / "api").glob("*.md")]
    listed = [name for page in pages for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)]
    assert len(listed) == len(set(listed))
    # A name of the top level may stand in a namespace as well, and is listed where users write it.
    top = {name.rpartition(".")[2] for name in public_names() if name.count(".") == 1}
    want = {name for name in public_names() if name.count(".") == 1 or name.rpartition(".")[2] not in top}
    modules = {name for name in listed if inspect.ismodule(getattr(pdx, name.rpartition(".")[2], None))}
    assert set(listed) - modules == want


def constants(node):
    """The constant parts of a string, with those of expressions in it."""
    return [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def code():
    for path in sorted(pathlib.Path(pdx.__file__).parent.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def strings(tree):
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]


def quoted():
    """The messages that the FAQ quotes, each as its parts: the first cells of its tables, `…` for what varies."""
    rows = re.findall(r"^\| `` (.*?) `` \|", (DOCS / "faq.md").read_text(), re.MULTILINE)
    return [[part.strip() for part in row.split("…") if part.strip()] for row in rows]


def test_every_message_that_the_faq_quotes_is_in_the_code():
    found = [constants(node) for _, tree in code() for node in strings(tree)]
    assert len(quoted()) > 40
    for parts in quoted():
        # All parts of a message stand in one string.
        assert any(all(any(part in c for c in string) for part in parts) for string in found), parts


def raised():
    """The messages of all errors and warnings in the code, as constant parts."""
    for path, tree in code():
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func).rpartition(".")[2]
            # (`AssertionError` is for what cannot happen.)
            if name == "AssertionError" or not (isinstance(node, ast.Raise) or name in ("error_if", "warn")):
                continue
            for argument in call.args:
                if isinstance(argument, ast.JoinedStr) or (
                    isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                ):
                    yield path, constants(argument)


def test_every_message_of_the_code_is_in_the_faq():
    messages = list(raised())
    assert len(messages) > 40
    known = quoted()
    for path, parts in messages:
        assert any(all(any(q in part for part in parts) for q in quote) for quote in known), (path.name, parts)


def test_every_row_for_users_of_diffrax_names_tests_that_exist():
    text = (DOCS / "from_diffrax.md").read_text()
    rows = [row for row in re.findall(r"^\| (?!-).*\|$", text, re.MULTILINE) if "tested by" not in row]
    assert len(rows) > 20
    defined = {
        (path.stem, node.name)
        for path in (REPOSITORY / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for row in rows:
        tests = re.findall(r"`(test_\w+)::(test_\w+)`", row)
        assert tests and set(tests) <= defined, row


# The rows of the table of speed: the platform, how the text calls a problem, and which row of the results it is.
SPEED = (
    ("GPU", "FitzHugh-Nagumo, 64 constant steps", {"steps": 64, "problem": "FitzHugh-Nagumo"}),
    ("GPU", "4096 constant steps", {"steps": 4096}),
    ("GPU", "the same, gradient", {"steps": 4096, "gradient": True}),
    ("GPU", "512 constant steps", {"steps": 512, "batch": 131072}),
    ("GPU", "T = 100, `PIDController`, 1e-6", {"problem": "FitzHugh-Nagumo", "tolerance": 1e-6}),
    ("GPU", "Lorenz, T = 1, `PIDController`, 1e-8", {"problem": "Lorenz, T = 1", "batch": 524288}),
    ("GPU", "the same, gradient", {"problem": "Lorenz, T = 1", "batch": 32768, "gradient": True}),
    (
        "GPU",
        "neural ODE, `PIDController`, 1e-3, loss and gradient",
        {"problem": "neural ODE", "steps": None, "batch": 256},
    ),
    ("CPU", "FitzHugh-Nagumo, 4096 constant steps", {"steps": 4096}),
    ("CPU", "the same, gradient", {"steps": 4096, "gradient": True}),
    ("CPU", "T = 100, `PIDController`, 1e-6", {"problem": "FitzHugh-Nagumo", "tolerance": 1e-6}),
    ("CPU", "the same, gradient", {"problem": "FitzHugh-Nagumo", "tolerance": 1e-6, "gradient": True}),
)
SPEED_PAGES = ("README.md", "docs/measured.md")
SPEED_BEGIN, SPEED_END = "<!-- speed -->\n\n", "\n<!-- /speed -->"


def speed() -> str:
    """The table of speed, from the map of regimes."""

    def number(x):
        return f"{x:.0f}" if x >= 10 else f"{x:.2f}" if x < 1 else f"{x:.1f}"

    lines = ["| | problem | batch | Diffrax, ms | ours, ms | ratio |", "|---|---|---|---|---|---|"]
    for platform, name, what in SPEED:
        rows = json.loads((REPOSITORY / f"benchmarks/results/regimes_{platform.lower()}.json").read_text())["rows"]
        gradient = what.get("gradient", what.get("problem") == "neural ODE")
        want = {"batch": 1, "outputs": None, "event": None, **what, "gradient": gradient}
        (row,) = [r for r in rows if all((r.get(key) or None) == (value or None) for key, value in want.items())]
        times = f"{number(row['diffrax_ms'])} | {number(row['ours_ms'])} | {number(row['ratio'])}"
        lines.append(f"| {platform} | {name} | {row['batch']} | {times} |")
    return "\n".join([*lines, ""])


@pytest.mark.parametrize("page", SPEED_PAGES)
def test_the_table_of_speed_is_that_of_the_results(page):
    text = (REPOSITORY / page).read_text()
    assert text[text.index(SPEED_BEGIN) + len(SPEED_BEGIN) : text.index(SPEED_END)] == speed(), (
        "run `python -m tests.test_docs`"
    )


if __name__ == "__main__":
    for page in SPEED_PAGES:
        before, _, rest = (REPOSITORY / page).read_text().partition(SPEED_BEGIN)
        (REPOSITORY / page).write_text(before + SPEED_BEGIN + speed() + SPEED_END + rest.partition(SPEED_END)[2])
    sys.stdout.write(speed())
