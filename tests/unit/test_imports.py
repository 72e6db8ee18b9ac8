"""Who may import whom, held by reading every file's imports.

asyncppo  ◀── rollout_server
asyncppo  ◀── trainer           the two never meet; a heavy package has one file that imports it
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGES = ("asyncppo", "rollout_server", "trainer")
TOOLS = tuple(f"asyncppo.{name}" for name in ("cli", "monitor", "report", "demo", "programs", "compare", "status"))
"""What people run; the programs do not depend on it."""


@dataclass(frozen=True)
class Import:
    """One import statement's target, as seen from one module."""

    importer: str
    target: str
    deferred: bool
    """Whether it is inside a function, or only there for the type checker."""

    def reaches(self, *packages: str) -> bool:
        return any(self.target == package or self.target.startswith(f"{package}.") for package in packages)

    def comes_from(self, *packages: str) -> bool:
        return any(self.importer == package or self.importer.startswith(f"{package}.") for package in packages)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports_in(node: ast.AST, module: str, deferred: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(module, alias.name, deferred) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: a relative import; write the whole name"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                yield Import(module, whole if whole in FILES else str(child.module), deferred)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            checking = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from imports_in(child, module, deferred or function or checking)


IMPORTS = [
    found for module, path in FILES.items() for found in imports_in(ast.parse(path.read_text(encoding="utf-8")), module)
]


def offenders(importers: tuple[str, ...], targets: tuple[str, ...]) -> list[str]:
    return [f"{i.importer} imports {i.target}" for i in IMPORTS if i.comes_from(*importers) and i.reaches(*targets)]


def test_the_files_are_found() -> None:
    assert {"asyncppo.cli", "rollout_server.reward", "trainer.learner"} <= set(FILES)
    assert any(found.deferred for found in IMPORTS)


def test_asyncppo_imports_neither_program() -> None:
    assert offenders(("asyncppo",), ("trainer", "rollout_server")) == []


def test_the_rollout_server_imports_neither_the_trainer_nor_the_tools_nor_the_algorithm() -> None:
    assert offenders(("rollout_server",), ("trainer", *TOOLS, "asyncppo.algorithm")) == []


def test_the_trainer_imports_neither_the_rollout_server_nor_the_tools() -> None:
    assert offenders(("trainer",), ("rollout_server", *TOOLS)) == []


def test_the_tools_are_imported_by_nothing_but_themselves() -> None:
    rest = tuple(name for name in FILES if name.startswith("asyncppo.") and not name.startswith(TOOLS))
    assert offenders(rest, TOOLS) == []


def test_the_stream_knows_nothing_of_the_models() -> None:
    assert offenders(("trainer.stream",), ("trainer.model",)) == []


def test_the_models_know_of_the_stream_only_its_batch() -> None:
    met = {(i.importer, i.target) for i in IMPORTS if i.comes_from("trainer.model") and i.reaches("trainer.stream")}
    assert met <= {(f"trainer.model.{name}", "trainer.stream.batch") for name in ("policy", "critics")}


def test_only_the_algorithm_brings_torch_into_asyncppo() -> None:
    importers = {found.importer for found in IMPORTS if found.reaches("torch") and found.comes_from("asyncppo")}
    assert {name for name in importers if not name.startswith("asyncppo.algorithm")} == set()


@pytest.mark.parametrize(
    ("package", "importers"),
    [
        ("zmq", {"asyncppo.transport.zmq"}),
        ("deepspeed", {"trainer.model.deepspeed_engine"}),
        ("sglang", {"rollout_server.sglang_process"}),
        ("math_verify", {"asyncppo.rewards"}),
        ("matplotlib", {"asyncppo.report.plots", "asyncppo.report.compare_plots"}),
    ],
)
def test_a_heavy_package_has_its_own_importers(package: str, importers: set[str]) -> None:
    assert {found.importer for found in IMPORTS if found.reaches(package)} == importers


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    edges: dict[str, set[str]] = {module: set() for module in FILES}
    for found in IMPORTS:
        if not found.deferred and found.target in FILES and found.target != found.importer:
            edges[found.importer].add(found.target)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())
