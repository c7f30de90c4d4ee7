"""Style, script and theme of the page."""

import shutil
import subprocess

import pytest

from pipelines.inference.app import assets

gr = pytest.importorskip("gradio")


def test_theme_loads_no_fonts():
    theme = assets.theme()
    assert theme._stylesheets == []
    assert "@font-face" not in theme._get_theme_css()


def test_script_joins_the_modules_without_their_syntax():
    script = assets.script("sv")
    assert script.startswith("() => {") and script.endswith("}")
    for name in ("createPlayer", "createMicrophone", "startPage"):
        assert script.count(f"function {name}(") == 1
    assert not [line for line in script.splitlines() if line.startswith(("import ", "export "))]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_script_is_valid_javascript(tmp_path):
    (tmp_path / "page.js").write_text(f"const run = {assets.script('sv')}\n", "utf-8")
    done = subprocess.run(["node", "--check", tmp_path / "page.js"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
