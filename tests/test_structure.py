"""The three rooms import in one direction, nothing private is imported from elsewhere, and what is public is documented."""

import ast
import importlib
import inspect
import pathlib

import parallel_diffrax as pdx


PACKAGE = pathlib.Path(pdx.__file__).parent
ROOMS = {"_scan": set(), "_recurrence": {"_scan"}, "_ode": {"_scan", "_recurrence"}}
FOREIGN = {"diffrax", "equinox", "optimistix", "lineax"}


# `_compat.py` for single names; `_loop_state.py` for the state of Diffrax's loop, which every adjoint is handed.
CONTACTS = {"_compat.py", "_loop_state.py"}


def sources():
    return [(path, ast.parse(path.read_text())) for path in sorted(PACKAGE.rglob("*.py"))]


def imported(path, tree):
    """Absolute dotted names of everything that a file imports, with the imported names."""
    package = (PACKAGE.name, *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_imports_go_from_scan_to_recurrence_to_ode_and_never_back():
    seen = 0
    for path, tree in sources():
        room = path.relative_to(PACKAGE).parts[0]
        for name in imported(path, tree):
            parts = name.split(".")
            if parts[0] == PACKAGE.name and len(parts) > 1 and parts[1] in ROOMS and room in ROOMS:
                seen += 1
                assert parts[1] == room or parts[1] in ROOMS[room], f"{path} imports {name}"
    assert seen > 20


def test_lower_rooms_know_no_diffrax():
    for path, tree in sources():
        if path.relative_to(PACKAGE).parts[0] in ("_scan", "_recurrence"):
            assert not any(name.split(".")[0] == "diffrax" for name in imported(path, tree)), path


def test_nothing_private_of_other_packages_is_imported_or_used():
    for path, tree in sources():
        if path.name in CONTACTS:
            continue
        for name in imported(path, tree):
            parts = name.split(".")
            if parts[0] in FOREIGN:
                assert not any(part.startswith("_") or part == "internal" for part in parts), f"{path} imports {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in ("dfx", "eqx", "optx", "lx"):
                    assert not node.attr.startswith("_") and node.attr != "internal", f"{path}:{node.lineno}"


def test_files_and_functions_stay_short():
    for path, tree in sources():
        assert len(path.read_text().splitlines()) <= 400, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                length = node.end_lineno - node.lineno - docstring.count("\n")
                assert length <= 60, f"{path}: {node.name}"


def test_every_public_name_is_documented():
    names = [n for n, value in vars(pdx).items() if not n.startswith("_") and not inspect.ismodule(value)]
    assert {"ParallelSolver", "ParallelNewton", "parallel_scan", "CoarsePredictor"} <= set(names)
    for name in names:
        assert len(inspect.getdoc(getattr(pdx, name)) or "") > 80, name


def test_every_module_says_what_it_is_for():
    for path, tree in sources():
        assert ast.get_docstring(tree), path
        module = ".".join([PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts])
        importlib.import_module(module.removesuffix(".__init__"))
