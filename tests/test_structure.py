"""Rooms import in one direction, JAX's internals are used in one room, and what is public is documented."""

import ast
import importlib
import inspect
import pathlib

import parallel_diffrax as pdx


PACKAGE = pathlib.Path(pdx.__file__).parent
REPOSITORY = pathlib.Path(__file__).parent.parent
# Lowest first. A room imports from itself and from those below it.
ROOMS = ("_kernels", "_scan", "_recurrence", "_ode")
FOREIGN = {"jax", "jaxlib", "diffrax", "equinox", "optimistix", "lineax"}
# Only the lowest room looks inside JAX: its kernels, its programs, its tracers.
INTERNALS = ("jax.experimental.pallas", "jaxlib.mlir", "jax.extend", "jax.core", "jax.interpreters")
# Where private names of other packages stand: a file a room, and the state of Diffrax's loop, which every adjoint is handed.
CONTACTS = {"_compat.py", "_loop_state.py"}


def sources(*folders):
    paths = sorted(path for folder in folders or [PACKAGE] for path in folder.rglob("*.py"))
    return [(path, ast.parse(path.read_text())) for path in paths]


def imported(path, tree):
    """The absolute dotted names of everything that a file imports, with the imported names."""
    package = (PACKAGE.name, *path.relative_to(PACKAGE).parent.parts) if path.is_relative_to(PACKAGE) else ()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def used(tree):
    """Dotted attributes as they are written, `jax.core.Tracer`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def is_private(part):
    return part == "internal" or (part.startswith("_") and not part.startswith("__"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0]


def test_rooms_import_from_those_below_and_never_back():
    seen = 0
    for path, tree in sources():
        if room_of(path) not in ROOMS:
            continue
        for name in imported(path, tree):
            parts = name.split(".")
            if parts[0] == PACKAGE.name:
                seen += 1
                assert parts[1] in ROOMS, f"{path} imports {name}"
                assert ROOMS.index(parts[1]) <= ROOMS.index(room_of(path)), f"{path} imports {name}"
    assert seen > 100


def test_rooms_are_entered_by_their_front_door():
    """Of another room a file imports what that room's `__init__.py` offers."""
    for path, tree in sources():
        for name in imported(path, tree):
            parts = name.split(".")
            if parts[0] == PACKAGE.name and len(parts) > 2 and parts[1] != room_of(path):
                assert len(parts) == 3, f"{path} imports {name}"


def test_only_the_lowest_room_looks_inside_jax():
    for path, tree in sources():
        if room_of(path) == "_kernels":
            continue
        for name in [*imported(path, tree), *used(tree)]:
            assert not name.startswith(INTERNALS), f"{path} uses {name}"


def test_optional_and_large_packages_are_imported_on_demand():
    for path, tree in sources():
        at_import = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        for name in imported(path, at_import):
            assert name.split(".")[0] != "warp" and not name.startswith("jax.experimental.pallas"), (
                f"{path} imports {name}"
            )


def test_lower_rooms_know_no_diffrax():
    for path, tree in sources():
        if room_of(path) in ROOMS[:-1]:
            assert not any(name.split(".")[0] == "diffrax" for name in imported(path, tree)), path


def test_nothing_private_of_other_packages_is_imported_or_used():
    folders = [PACKAGE, *(REPOSITORY / name for name in ("tests", "examples", "benchmarks"))]
    for path, tree in sources(*folders):
        if path.name in CONTACTS:
            continue
        for name in imported(path, tree):
            parts = name.split(".")
            if parts[0] in FOREIGN:
                assert not any(map(is_private, parts)), f"{path} imports {name}"
        for name in used(tree):
            parts = name.split(".")
            if parts[0] in ("jax", "dfx", "eqx", "optx", "lx"):
                assert not any(map(is_private, parts[1:])), f"{path} uses {name}"


def public_names(module):
    return [n for n, value in vars(module).items() if not n.startswith("_") and not inspect.ismodule(value)]


def test_the_top_level_is_small_and_every_public_name_is_documented():
    namespaces = [
        value
        for value in vars(pdx).values()
        if inspect.ismodule(value) and value.__name__.startswith(f"{PACKAGE.name}.") and "._" not in value.__name__
    ]
    assert len(namespaces) + len(public_names(pdx)) <= 24
    assert {"ParallelSolver", "ParallelNewton", "parallel_scan", "CoarsePredictor"} <= set(public_names(pdx))
    assert len(namespaces) >= 4
    for module in (pdx, *namespaces):
        assert len(inspect.getdoc(module) or "") > 20, module
        for name in public_names(module):
            assert len(inspect.getdoc(getattr(module, name)) or "") > 60, name


def test_every_module_says_what_it_is_for():
    for path, tree in sources():
        assert ast.get_docstring(tree), path
        module = ".".join([PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts])
        importlib.import_module(module.removesuffix(".__init__"))


def test_no_module_defines_a_name_twice():
    """Two constants of one name, as when files are merged: the second silently serves both."""
    for path, tree in sources():
        names = []
        for node in tree.body:
            if isinstance(node, ast.Assign):
                names += [target.id for target in node.targets if isinstance(target, ast.Name)]
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.append(node.name)
        # `_` is a rule that is registered and never called by name.
        repeated = {name for name in names if name != "_" and names.count(name) > 1}
        assert not repeated, f"{path}: {repeated}"
