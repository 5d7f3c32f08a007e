"""Importing stays light, imports run one way, and what needs no torch runs without it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import difffeat
from tests.artifacts import exported
from tests.runtime.fake import folder_of_images

ROOT = Path(difffeat.__file__).parent
HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "diffusers", "transformers", "tensorrt", "sklearn", "scipy", "matplotlib", "PIL", "pyarrow")
LAYERS = (("errors", "recipe"), ("export",), ("engines",), ("runtime",), ("probe",), ("workflows", "benchmarks"), ("cli", "__main__"))
FORBIDDEN = {("runtime", "export"), ("probe", "engines"), ("probe", "export")}
"""Pairs that the order of the layers would allow, and the design does not."""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT.parent)


def loaded_after(statement: str) -> set[str]:
    result = python(f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))")
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in result.stdout.splitlines()}


def test_importing_the_package_loads_no_heavy_library() -> None:
    assert not loaded_after("import difffeat, difffeat.errors, difffeat.recipe") & {*HEAVY, "numpy"}


def test_the_commands_help_loads_no_heavy_library() -> None:
    code = "import sys, contextlib\nsys.argv = ['difffeat', '--help']\nfrom difffeat.cli import main\nwith contextlib.suppress(SystemExit): main()"
    assert not loaded_after(code) & {*HEAVY, "numpy"}


def test_opening_a_store_loads_neither_torch_nor_a_runtime() -> None:
    assert not loaded_after("import difffeat; difffeat.Store, difffeat.LinearProbe") & {"torch", "onnx", "onnxruntime", "diffusers"}


@pytest.mark.parametrize("name", difffeat.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(difffeat, name).__name__ == name
    assert name in dir(difffeat)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'difffeat' has no attribute 'Nothing'"):
        _ = difffeat.Nothing  # type: ignore[attr-defined]


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem != "__init__")


def part(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a module imports anywhere, also inside functions; those for the type checker alone are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names if node.module == "difffeat"]
    return {name.split(".")[1] for name in names if name.startswith("difffeat.")} - {"__version__"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    own = part(path)
    for other in imported_parts(path):
        assert level[other] <= level[own], f"{own} imports {other}"
        assert (own, other) not in FORBIDDEN, f"{own} imports {other}"


def test_the_rule_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    module = tmp_path / "bad.py"
    module.write_text("def f():\n    from difffeat.workflows import scenes\n")
    assert imported_parts(module) == {"workflows"}


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnxscript", "diffusers", "transformers", "huggingface_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize("name", ["image", "sweep", "text"])
def test_extraction_from_a_graph_needs_no_torch(name: str, tmp_path: Path) -> None:
    source = folder_of_images(tmp_path / "images", 3)
    code = BLOCKED + "from difffeat.cli import main\nmain()"
    result = python(code, "extract", str(exported(name).path), str(source), "-o", str(tmp_path / "out"), "--store-dtype", "fp32")
    assert result.returncode == 0, result.stderr
    assert "3 rows in 1 shards" in result.stdout


def test_export_without_torch_names_the_extra(tmp_path: Path) -> None:
    code = BLOCKED.replace("raise ModuleNotFoundError", "return None  #") + "import importlib.util\nreal = importlib.util.find_spec\n"
    code += "importlib.util.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\nfrom difffeat.cli import main\nmain()"
    result = python(code, "export", "--model", "dit-digits", "-o", str(tmp_path / "out"))
    assert result.returncode == 2
    assert "pip install 'difffeat[export]'" in result.stderr
    assert "Traceback" not in result.stderr
