"""The rules of the house that a parser can check: directions of imports, sizes, unsafe loading, docstrings."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "emssl_hf"
FILES = sorted(PACKAGE.rglob("*.py"))

#: What each room may import besides itself. The top of the package (api, cli, recipes, ...) may import every room.
ALLOWED = {
    "errors": set[str](),
    "randomness": set[str](),
    "machine": set[str](),
    "recipes": {"errors"},
    "models": set[str](),
    "data": {"errors", "machine", "randomness"},
    "augment": {"models", "data", "errors", "machine", "randomness"},
    "engine": {"augment", "models", "data", "errors", "machine", "randomness"},
    "hub": {"recipes", "engine", "augment", "models", "data", "errors", "machine", "randomness"},
}
#: In the files that travel as remote code nothing else is there.
MODEL_LIBRARIES = {"torch", "numpy", "PIL", "transformers", "huggingface_hub"}

UNSAFE = {"pickle.load", "pickle.loads", "yaml.load", "eval", "exec", "os.system"}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def room_of(file: Path) -> str:
    """The top-level module or sub-package of ours that the file belongs to."""
    part = file.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(module, level) of every import that runs, those inside functions too, type checking left out."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "emssl_hf":
                yield from ((f"emssl_hf.{alias.name}", 0) for alias in node.names)
            else:
                yield node.module or "", node.level
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            pending += ast.iter_child_nodes(node)


def functions_of(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_one_way(file: Path) -> None:
    room = room_of(file)
    allowed = ALLOWED.get(room)
    for module, level in imports_of(tree_of(file)):
        if module.split(".")[0] != "emssl_hf" or level:
            continue
        target = module.split(".")[1] if "." in module else ""
        if room == "models":
            pytest.fail(f"{module}: files in models/ travel as remote code and import siblings by a single dot")
        if allowed is not None and target != "__version__":
            assert target == room or target in allowed, f"{room} must not import {module}"


@pytest.mark.parametrize("file", sorted((PACKAGE / "models").glob("*.py")), ids=name_of)
def test_files_that_travel_as_remote_code_import_siblings_and_few_libraries(file: Path) -> None:
    known = MODEL_LIBRARIES | set(sys.stdlib_module_names)
    for module, level in imports_of(tree_of(file)):
        assert level == 1 and "." not in module if level else module.split(".")[0] in known, f"{file.name}: {module}"


def test_no_module_imports_itself_in_a_circle() -> None:
    modules = {module_name(file): file for file in FILES}
    graph = {}
    for name, file in modules.items():
        targets = [module for module, _ in absolute_imports(file, name)]
        graph[name] = {target for target in targets if target in modules and target != name}
    state: dict[str, int] = {}

    def visit(name: str, path: list[str]) -> None:
        assert state.get(name) != 1, " -> ".join([*path[path.index(name) :], name])
        if state.get(name) is None:
            state[name] = 1
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            state[name] = 2

    for name in graph:
        visit(name, [])


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def absolute_imports(file: Path, name: str) -> Iterator[tuple[str, ast.AST]]:
    """Modules of ours that a file imports when it is loaded: functions, which run later, are left out."""
    for node in tree_of(file).body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = name if file.name == "__init__.py" else name.rpartition(".")[0]
            base = f"{home}.{node.module}" if node.level and node.module else home if node.level else str(node.module)
            yield base, node
            yield from ((f"{base}.{alias.name}", node) for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_stay_readable(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 350
    for function in functions_of(tree_of(file)):
        assert (function.end_lineno or 0) - function.lineno + 1 <= 60, function.name


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_nothing_is_loaded_in_an_unsafe_way(file: Path) -> None:
    for call in (node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {item.arg: ast.unparse(item.value) for item in call.keywords}
        if name == "torch.load":
            assert given.get("weights_only") == "True", f"line {call.lineno}"
        if name == "np.load":
            assert given.get("allow_pickle") == "False", f"line {call.lineno}"
        assert given.get("trust_remote_code") in (None, "False"), f"line {call.lineno}"
        assert name not in UNSAFE, f"line {call.lineno}"
        assert given.get("shell") in (None, "False"), f"line {call.lineno}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_what_is_public_explains_itself(file: Path) -> None:
    tree = tree_of(file)
    if tree.body:
        assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert node.returns is not None and all(argument.annotation for argument in given), f"{node.name}: no types"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_error_is_swallowed(file: Path) -> None:
    for handler in (node for node in ast.walk(tree_of(file)) if isinstance(node, ast.ExceptHandler)):
        assert handler.type is not None, f"line {handler.lineno}: a bare except"
        assert not all(isinstance(line, ast.Pass) for line in handler.body), f"line {handler.lineno}: swallowed"


def test_the_package_can_be_imported_without_anything_heavy() -> None:
    heavy = ("torch", "transformers", "datasets", "kornia")
    code = f"import sys, emssl_hf; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr
