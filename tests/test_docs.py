"""The documentation builds without a warning, has every public name, and its code runs as printed."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import sphinx
import torch
from sphinx.util.inventory import InventoryFile

import optfn

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(path for path in DOCS.glob("*.md") if "```python" in path.read_text())
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages that ``make docs`` built without a warning, unless something has changed since; else a build."""
    done, package = DOCS / "_build" / "built", Path(optfn.__file__).parent
    sources = [*DOCS.glob("*.*"), *DOCS.glob("api/*"), *DOCS.glob("notebooks/*"), *package.rglob("*.py"), Path(sphinx.__file__)]
    if done.exists() and all(path.stat().st_mtime < done.stat().st_mtime for path in sources):
        return done.with_name("html")
    out = tmp_path_factory.mktemp("docs")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-E",
        "-b",
        "html",
        "-d",
        str(out / "trees"),
        str(DOCS),
        str(out),
    ]
    # A proxy that no one listens on: the build must not need a network.
    env = {**os.environ, "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_every_public_name_is_in_the_api(built: Path) -> None:
    inventory = InventoryFile.loads((built / "objects.inv").read_bytes(), uri="").data
    documented = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    names = ("distributed", "interop", "microbatching", "perturbations", "projections", "random", "second_order", "tree")
    modules = {"optfn": optfn, **{f"optfn.{name}": getattr(optfn, name) for name in names}}
    wanted = {f"{prefix}.{name}" for prefix, module in modules.items() for name in module.__all__ if name != "__version__"}
    assert wanted <= documented, f"not in docs/api: {sorted(wanted - documented)}"


@pytest.mark.slow
def test_notebooks_are_pages_with_their_plots(built: Path) -> None:
    for name in ("quickstart", "sweep"):
        page = (built / "notebooks" / f"{name}.html").read_text()
        assert page.count("<img") >= 3


@pytest.mark.codegen
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_in_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run in order with the names of those before; one that begins with >>> also has to print what it says."""
    torch.manual_seed(0)
    text = page.read_text()
    module = ModuleType(f"page_{page.stem}")  # Dynamo looks up globals in the module that a function names
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.REPORT_NDIFF)
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        if not block[1].startswith(">>>"):
            exec(compile("\n" * line + block[1], str(page), "exec"), names)
            continue
        example = doctest.DocTestParser().get_doctest(block[1], names, page.stem, str(page), line)
        report: list[str] = []
        runner.run(example, out=report.append, clear_globs=False)
        names.update(example.globs)
        assert not report, "".join(report)


def test_every_block_is_seen() -> None:
    for page in DOCS.rglob("*.md"):
        fences = set(re.findall(r"^```(\S+)", page.read_text(), re.MULTILINE))
        assert fences <= {"python", "{toctree}", "{eval-rst}", "sh", "text"}, f"{page}: code in {fences} is not run by these tests"
