"""The layers of the design hold: who imports whom, in the source and in `sys.modules` of fresh interpreters.

The source shows every import, also those inside functions and under `TYPE_CHECKING`; a fresh interpreter shows what an
import really drags in. Modules that share a rule share one interpreter, where each is judged by what was there right
after it was imported, so that a failure names the first offender.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

WEB = frozenset({"fastapi", "sse_starlette", "starlette", "uvicorn"})
ENGINE = frozenset({"vllm"})
MODELS = frozenset({"vllm", "transformers"})
TENSORS = frozenset({"vllm", "transformers", "torch"})

STEERING_CORE = (
    "steering.errors",
    "steering.terms",
    "steering.gate",
    "steering.plan",
    "steering.manifest",
    "steering.bundle",
)
SERVER_CORE = ("server.service", "server.policy")
VLLM_IS_NAMED_IN = (
    "steering.engine",
    "server.vllm_engine",
    "server.vllm_metrics",
    "server.vllm_options",
    "server.bench.resident",
)

IMPORT_EACH = """
import importlib, json, sys
watched, seen = set(json.loads(sys.argv[1])), {}
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
    seen[name] = sorted(watched.intersection(sys.modules))
print("\\n" + json.dumps(seen))
"""


class Import(NamedTuple):
    """One import statement: the module that holds it, the line, the full name it imports."""

    module: str
    line: int
    target: str


def package_root(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"package {package!r} is not installed; run `make setup`")
    return Path(spec.submodule_search_locations[0])


def modules_of(package: str) -> dict[str, Path]:
    """Every module of `package` by dotted name."""
    root = package_root(package)
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = (package, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path) -> Iterator[Import]:
    """Every import in the source of `module`, relative ones resolved, function-level ones included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        match node:
            case ast.Import(names=names):
                yield from (Import(module, node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                base = importlib.util.resolve_name("." * level + (source or ""), package) if level else str(source)
                yield from (Import(module, node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(target)), *_]):
                yield Import(module, node.lineno, target)
            case _:
                pass


def is_within(name: str, packages: tuple[str, ...] | frozenset[str]) -> bool:
    """Whether dotted `name` is one of `packages` or lies below one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def loaded_after(modules: list[str], watched: frozenset[str]) -> dict[str, list[str]]:
    """Import `modules` one after the other in one fresh interpreter; which of `watched` were loaded after each."""
    if not modules:
        return {}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_EACH, json.dumps(sorted(watched)), json.dumps(modules)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert result.returncode == 0, f"importing {modules} failed:\n{result.stderr[-4000:]}"
    seen: dict[str, list[str]] = json.loads(result.stdout.rstrip().rpartition("\n")[2])
    return seen


def first_offender(modules: list[str], forbidden: frozenset[str]) -> str | None:
    """`"module loads x, y"` for the first of `modules` after which something forbidden was loaded, None if none."""
    for name, loaded in loaded_after(modules, forbidden).items():
        if loaded:
            return f"{name} loads {', '.join(loaded)}"
    return None


def existing(*names: str) -> list[str]:
    """Those of `names` that there is a module for."""
    return [name for name in names if name in modules_of(name.partition(".")[0])]


@pytest.fixture(scope="module")
def all_imports() -> list[Import]:
    """Every import statement of both packages."""
    return [
        found
        for package in ("steering", "server")
        for module, path in modules_of(package).items()
        for found in imports_of(module, path)
    ]


@pytest.mark.parametrize("module", [*STEERING_CORE, *SERVER_CORE, "server.cli", "server.vllm_engine"])
def test_modules_with_a_rule_of_their_own_exist(module: str) -> None:
    """A rule is not kept by renaming what it is about: each named module is there."""
    assert existing(module) == [module]


def test_steering_source_never_names_server(all_imports: list[Import]) -> None:
    """No statement in `steering`, at any depth, imports `server`."""
    assert [i for i in all_imports if is_within(i.module, ("steering",)) and is_within(i.target, ("server",))] == []


def test_vllm_is_named_only_in_the_plugin_and_the_engine_adapter(all_imports: list[Import]) -> None:
    """`import vllm` in any form stands only in the plugin, the engine adapter and the bench's engine process."""
    assert [i for i in all_imports if is_within(i.target, ENGINE) and not is_within(i.module, VLLM_IS_NAMED_IN)] == []


def test_steering_core_source_names_no_model_library(all_imports: list[Import]) -> None:
    """The algebra, gate, plan, bundle and errors import neither vLLM nor transformers, not even inside a function."""
    assert [i for i in all_imports if i.module in STEERING_CORE and is_within(i.target, MODELS)] == []


def test_server_core_source_names_no_web_framework_and_no_torch(all_imports: list[Import]) -> None:
    """Service and policy are plain Python: requests come in and go out as values."""
    assert [i for i in all_imports if i.module in SERVER_CORE and is_within(i.target, WEB | TENSORS)] == []


def test_steering_core_loads_no_model_library() -> None:
    """Importing the algebra, gate, plan, bundle and errors loads neither vLLM nor transformers."""
    assert first_offender(existing(*STEERING_CORE), MODELS) is None


@pytest.mark.parametrize("module", SERVER_CORE)
def test_server_core_loads_no_web_framework_and_no_torch(module: str) -> None:
    """Service and policy can be imported, and so unit-tested, without FastAPI and without torch."""
    assert first_offender(existing(module), WEB | TENSORS) is None


def test_command_line_loads_no_torch() -> None:
    """`trimtab --help` answers at once: importing the command line loads neither torch, transformers nor vLLM."""
    assert first_offender(existing("server.cli"), TENSORS) is None


def test_only_the_plugin_and_the_engine_adapter_load_vllm() -> None:
    """Every module outside `steering/engine/` and `server/vllm_engine.py` is imported without vLLM."""
    outside = [
        name
        for package in ("steering", "server")
        for name in modules_of(package)
        if not is_within(name, VLLM_IS_NAMED_IN) and not name.endswith("__main__")
    ]
    assert first_offender(outside, ENGINE) is None


def test_steering_loads_no_server() -> None:
    """Importing every module of `steering`, the engine plugin included, never loads `server`."""
    assert (
        first_offender(
            [name for name in modules_of("steering") if not name.endswith("__main__")], frozenset({"server"})
        )
        is None
    )
