"""The README's assignments: each function blanked out in a copy turns its tests red, and nothing but it does.

    python tests/test_assignments.py 3    blanks out exercise 3 in videomar.py; git checkout videomar.py brings it back
"""
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXERCISES = {  # functions of videomar.py, and the tests of tests/test_model.py that are red without them
    1: (["rope_angles", "rotate"], "rope"),
    2: (["frame_causal_attention"], "causal"),
    3: (["draw_mask_ratio", "unmask_counts"], "mask_ratio or unmask"),
    4: (["DiffusionMLP.modulations", "DiffusionMLP.denoise"], "adaln"),
    5: (["Diffusion.q_sample", "Diffusion.posterior"], "posterior"),
    6: (["VideoMAR.draw_masked"], "next_frame or frame_t"),
    7: (["VideoMAR.forward"], "cut_sequence"),
    8: (["Cache.update"], "cache"),
    9: (["progressive_temperature"], "progressive"),
    10: (["Diffusion.sample"], "cfg or guidance"),
}


def blank(source, names):
    """The source with the bodies of the named functions replaced by an error; docstrings stay."""
    lines = source.split("\n")
    for name in names:
        *owner, function = name.split(".")
        nodes = ast.parse(source).body
        for part in owner:  # the class
            nodes = next(node.body for node in nodes if getattr(node, "name", None) == part)
        node = next(node for node in nodes if getattr(node, "name", None) == function)
        body = node.body[1:] if ast.get_docstring(node) else node.body
        first, rest = body[0].lineno - 1, body[-1].end_lineno
        lines[first:rest] = [f'{" " * body[0].col_offset}raise NotImplementedError("{name}: write this")']
        lines[first + 1:first + 1] = [None] * (rest - first - 1)  # the numbers of later lines stay
    return "\n".join(line for line in lines if line is not None)


def command(exercise):
    return f'pytest tests/test_model.py -k "{EXERCISES[exercise][1]}"'


def outcome(folder, exercise):
    """The exit code of the exercise's command in a folder: 0 green, 1 red; a hang or no such test is neither."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_model.py"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*pytest, "-k", EXERCISES[exercise][1]], cwd=folder, capture_output=True, timeout=120,
                          env=environment)
    return done.returncode


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for name in ("videomar.py", "sample.py", "tokenizer.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").mkdir()
    for name in ("conftest.py", "test_model.py"):
        shutil.copy(ROOT / "tests" / name, folder / "tests")
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("*.pt", "*.gif", "*.png"))
    return folder


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_exercise_is_red_while_it_is_blank(copy, exercise):
    """Green when it is right is what the tests of test_model.py are anyway; here, that they are the ones selected."""
    source = (ROOT / "videomar.py").read_text()
    (copy / "videomar.py").write_text(blank(source, EXERCISES[exercise][0]))
    assert outcome(copy, exercise) == 1
    if exercise == 1:
        (copy / "videomar.py").write_text(source)
        assert all(outcome(copy, e) == 0 for e in (1, 7, 9))


def test_the_readme_sets_them():
    readme = (ROOT / "README.md").read_text()
    for exercise, (names, _) in EXERCISES.items():
        assert command(exercise) in readme and all(f"`{name}`" in readme for name in names)


if __name__ == "__main__":
    path, exercise = ROOT / "videomar.py", int(sys.argv[1])
    names, _ = EXERCISES[exercise]
    path.write_text(blank(path.read_text(), names))
    print(f"{path}: blanked out {', '.join(names)}; {command(exercise)}")
