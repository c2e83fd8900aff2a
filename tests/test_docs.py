"""What README and docstrings show is run."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import gpuconv

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = [
    "gpuconv.conv",
    "gpuconv.backends",
    "gpuconv.filters",
    "gpuconv.grad",
    "gpuconv.ndimage",
    "gpuconv.signal",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_every_public_function_shows_an_example_that_runs():
    for name in gpuconv.__all__:
        doc = getattr(gpuconv, name).__doc__
        assert doc, name
        if callable(getattr(gpuconv, name)) and not isinstance(getattr(gpuconv, name), type):
            assert ">>> " in doc, name


def test_readme_python_prints_what_its_comments_say(capsys):
    scope: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        exec(compile(block, "README.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "(8, 64, 112, 112)" in printed
    assert "[[[0.04 0.2  0.37 0.3  0.09]]]" in printed
    assert "-> " in printed  # the plan
    assert isinstance(scope["y"], np.ndarray)


def test_readme_begins_with_what_it_is_and_two_commands():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks[:2]] == ["sh", "sh"]
    assert all(len(text.strip().splitlines()) == 1 for _, text in blocks[:2])
    intro = README.split("\n\n")[1]
    assert len(intro.splitlines()) == 3


def test_readme_first_command_makes_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    from gpuconv import cli

    monkeypatch.chdir(tmp_path)
    command = re.search(r"^```sh\n.*?bin/gpuconv (.*?)\n```", README, re.MULTILINE).group(1)
    assert cli.main(shlex.split(command)) == 0
    from PIL import Image

    assert Image.open(tmp_path / "ridge.png").size[0] > 1500


def test_readme_command_line_examples_parse(tmp_path, monkeypatch, capsys):
    pytest.importorskip("PIL")
    from gpuconv import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main(["filter", "--help"])
    assert stopped.value.code == 0
    for line in re.findall(r"^gpuconv (plan.*|info.*)$", README, re.MULTILINE):
        assert cli.main(shlex.split(line)) == 0
    assert "im2col" in capsys.readouterr().out


def test_readme_output_formula_is_worked_right():
    formula = re.search(r"\(224 \+ 3 \+ 3 - 1\*\(7-1\) - 1\) // 2 \+ 1", README).group(0)
    assert eval(formula) == 112


def test_readme_boundary_table():
    names = {"zeros": "constant", "replicate": "edge", "circular": "wrap"}
    rows = re.findall(r'^\| `"(\w+)"` \| `([^`]*)` \*\*a b c d\*\* `([^`]*)` \|$', README, re.M)
    assert len(rows) == 5
    for mode, before, after in rows:
        letters = dict(zip([1, 2, 3, 4, 0], "abcd0", strict=True))
        padded = np.pad([1, 2, 3, 4], 3, names.get(mode, mode))
        assert " ".join(letters[v] for v in padded.tolist()) == f"{before} a b c d {after}"


def test_links_and_pictures_of_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_project_needs_numpy_alone():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.split(r"[<>=!]", d)[0] for d in project["dependencies"]] == ["numpy"]
