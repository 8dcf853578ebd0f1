"""The OpenAI SDK's own API tests: fetched, run against a server, compared with the list of what fails by design.

`python -m tests.conformance.sdk URL MODULE...` runs them by hand against any server, which must serve the model that a
module asks for: see `MODELS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

HERE = Path(__file__).resolve().parent
REQUIREMENT = HERE / "openai.txt"
BY_DESIGN = HERE / "by_design.json"
MODELS: Mapping[str, tuple[str, ...]] = {
    "gpt-6-astra": ("chat/test_completions.py", "test_models.py", "test_responses.py"),
    "gpt-3.5-turbo-instruct": ("test_completions.py",),
}
"""Modules below `tests/api_resources`, by the model that they ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What became of the tests of some modules; names are `module::Class::test`, without parameters.

    Attributes:
        passed: tests all of whose variants passed.
        failed: what was said of the first failure of the others.
        variants: how many were run in all.
    """

    passed: frozenset[str]
    failed: Mapping[str, str]
    variants: int


def fetch(folder: Path) -> Path:
    """The root of the source archive below a folder, which keeps it for the next time.

    Raises:
        subprocess.CalledProcessError: pip cannot get it, or its digest is another.
    """
    version = REQUIREMENT.read_text(encoding="utf-8").split("==")[1].split()[0]
    root = folder / f"openai-{version}"
    if not root.is_dir():
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(REQUIREMENT)]
        subprocess.run(command, check=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch, tarfile.open(f"{root}.tar.gz") as archive:
            archive.extractall(scratch, filter="data")
            (Path(scratch) / root.name).rename(root)
    return root


def run(root: Path, url: str, modules: Sequence[str]) -> Ran:
    """Run modules of the SDK's tests against a server, in a process of their own.

    Args:
        root: of `fetch`.
        url: of the server's root.
        modules: of `MODELS`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        # Their own settings start workers, which would come on top of ours.
        options = [
            "-q",
            "--tb=line",
            "-o",
            "addopts=",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            f"--junitxml={report}",
        ]
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *(f"tests/api_resources/{module}" for module in modules)],
            cwd=root,
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
            | {"TEST_API_BASE_URL": f"{url}/v1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode not in (0, 1):
            raise AssertionError(f"the SDK's tests did not run:\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}")
        cases = list(ET.parse(report).iter("testcase"))  # noqa: S314 - written by our own pytest
    failed: dict[str, str] = {}
    names = set()
    for case in cases:
        name = _name(case)
        names.add(name)
        if (failure := case.find("failure")) is not None:
            failed.setdefault(name, failure.get("message") or "")
        elif case.find("error") is not None or case.find("skipped") is not None:
            failed.setdefault(name, "did not run")
    return Ran(passed=frozenset(names - failed.keys()), failed=failed, variants=len(cases))


def by_design(modules: Sequence[str]) -> dict[str, int]:
    """The status each test that fails by design fails with."""
    groups = json.loads(BY_DESIGN.read_text(encoding="utf-8"))
    return {
        f"{module}::{kind}::{test}": group["status"]
        for group in groups
        for module in modules
        if module == group["module"]
        for test in group["tests"]
        for kind in (group["class"], group["class"].replace("Test", "TestAsync"))
    }


def differences(ran: Ran, expected: Mapping[str, int]) -> list[str]:
    """Where a run and the list disagree, in either direction."""
    found = [
        f"{name}: fails, and is not on the list: {said[:300]}"
        for name, said in ran.failed.items()
        if name not in expected
    ]
    found += [f"{name}: is on the list, and passes" for name in expected if name in ran.passed]
    found += [
        f"{name}: is on the list, and does not exist" for name in expected if name not in ran.passed | ran.failed.keys()
    ]
    found += [
        f"{name}: fails otherwise than the list says (status {status}): {ran.failed[name][:300]}"
        for name, status in expected.items()
        if name in ran.failed and f"Error code: {status} " not in ran.failed[name]
    ]
    return sorted(found)


def _name(case: ET.Element) -> str:
    """`module::Class::test` of a case."""
    *folders, module, kind = (case.get("classname") or "").removeprefix("tests.api_resources.").split(".")
    return f"{'/'.join([*folders, module])}.py::{kind}::{(case.get('name') or '').partition('[')[0]}"


def main() -> None:
    """Run modules against a server by hand; ends with 1 where the list is wrong."""
    url, modules = sys.argv[1], sys.argv[2:]
    ran = run(fetch(Path(tempfile.gettempdir())), url, modules)
    wrong = differences(ran, by_design(modules))
    print(f"{ran.variants} run: {len(ran.passed)} tests passed, {len(ran.failed)} failed, {len(wrong)} unexpected")  # noqa: T201
    print("\n".join(wrong))  # noqa: T201
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
