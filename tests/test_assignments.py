"""The README's assignments: each function blanked out in a copy turns its tests red, and nothing but it does.

    python tests/test_assignments.py 3        blanks out exercise 3 in videomar.py; git checkout videomar.py brings it back
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
    4: (["DiffusionHead.modulations", "DiffusionHead.denoise"], "adaln"),
    5: (["Diffusion.q_sample", "Diffusion.posterior"], "posterior"),
    6: (["VideoMAR.draw_masked"], "next_frame or frame_t"),
    7: (["VideoMAR.forward"], "cut_sequence"),
    8: (["Cache.update"], "cache"),
    9: (["progressive_temperature"], "progressive"),
    10: (["Diffusion.sample"], "cfg or guidance"),
}


def blank(source, names):
    """The source with the bodies of the named functions replaced by an error; docstrings stay."""
    lines, missing = source.split("\n"), set(names)
    for node in ast.walk(ast.parse(source)):
        for f in getattr(node, "body", []) if isinstance(node, (ast.Module, ast.ClassDef)) else []:
            name = f"{node.name}.{f.name}" if isinstance(node, ast.ClassDef) and isinstance(f, ast.FunctionDef) else getattr(f, "name", None)
            if name in names:
                body = f.body[1:] if ast.get_docstring(f) else f.body
                indent = " " * f.body[0].col_offset
                lines[body[0].lineno - 1:f.end_lineno] = [f'{indent}raise NotImplementedError("{name}: your turn")'] + [None] * (f.end_lineno - body[0].lineno)
                missing.discard(name)
    assert not missing, f"videomar.py has no {missing}"
    return "\n".join(line for line in lines if line is not None)


def command(exercise):
    return f'pytest tests/test_model.py -k "{EXERCISES[exercise][1]}"'


def outcome(folder, exercise):
    """The exit code of the exercise's command in a folder: 0 green, 1 red; a hang or no such test is neither."""
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_model.py", "-k", EXERCISES[exercise][1]],
                          cwd=folder, capture_output=True, timeout=120, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}).returncode


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
    path = ROOT / "videomar.py"
    path.write_text(blank(path.read_text(), EXERCISES[int(sys.argv[1])][0]))
    print(f"{path}: blanked out {', '.join(EXERCISES[int(sys.argv[1])][0])}; {command(int(sys.argv[1]))}")
