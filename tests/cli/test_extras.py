"""Without an extra the light install still extracts, and what needs the extra says how to install it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.artifacts import exported
from tests.runtime.fake import folder_of_images

ROOT = Path(__file__).parents[2]
WITHOUT_TORCH = """
import importlib.util, sys
real = importlib.util.find_spec
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else real(name, package)
sys.meta_path.insert(0, Hidden())
sys.argv = ["difffeat", *sys.argv[1:]]
from difffeat.cli import main
main()
"""


def without_torch(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT)


def test_an_export_names_the_extra_and_keeps_the_build_of_torch(tmp_path: Path) -> None:
    done = without_torch("export", "--model", "dit-digits", "-o", tmp_path / "artifact")
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "pip install 'difffeat[export]' -c constraints.txt" in done.stderr


def test_an_extraction_needs_no_torch(tmp_path: Path) -> None:
    images = folder_of_images(tmp_path / "images", 3)
    done = without_torch("extract", exported("image").path, images, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
