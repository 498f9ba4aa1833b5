"""The course: hands out the exercises of tests/assignments.md, and grades what comes back.

    python tests/assignments.py start DIR            a folder of the student's own, with all exercises blank
    python tests/assignments.py start DIR --only 3   the same, with the other ones solved; so for grade
    python tests/assignments.py --hint 4             a hint for exercise 4; --hint 4 2 is the second
    python tests/assignments.py grade DIR...         what is right in each folder, and what is wrong first

The repository itself is never changed. Of a folder only videomar.py is graded, by the version of the repository that
handed it out. Grading runs it as you, each check in a process of its own with a time limit: for code that you do not
trust, do this in a container. Grading needs Linux or macOS.
"""
import ast
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for this file as a script

import data  # noqa: F401, before torch
from PIL import Image

from assignment_checks import EXERCISES
from data.files import Bad, Parser, check_writable, number, run, write

ROOT, TESTS = Path(__file__).parent.parent, Path(__file__).parent
CODE = ("videomar.py", "sample.py", "train.py", "tokenizer.py", "requirements.txt", "LICENSE", "data")
STEPS, FRAMES, FILM_LIMIT = 100, 13, 900  # training steps of the reward, frames of its film, seconds for each command


# ------------------------------------------------------------------------------------------------------- start
def read_texts():
    """tests/assignments.md -> its head, and {exercise: (text, [hints])}."""
    head, *sections = (TESTS / "assignments.md").read_text(encoding="utf-8").split("\n## ")
    texts = {}
    for section in sections:
        text, *hints = section.split("\n### Hint\n")
        texts[int(text.split(".")[0])] = "## " + text.strip(), [hint.strip() for hint in hints]
    return head, texts


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
        lines[first:rest] = [f'{" " * body[0].col_offset}raise NotImplementedError("{name} is not written yet")']
        lines[first + 1:first + 1] = [None] * (rest - first - 1)  # the numbers of later lines stay
    return "\n".join(line for line in lines if line is not None)


def copy_code(folder):
    """The code that trains and samples, and what it needs of data/; all of it may be written, whatever ours may."""
    unused = shutil.ignore_patterns("__pycache__", "*-strip.png", "demo.webp", "cat.gif", "videomar-128.pt")
    for name in CODE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=unused, copy_function=shutil.copyfile)
            (folder / name).chmod(0o755)
        else:
            shutil.copyfile(ROOT / name, folder / name)


def start(folder, only):
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Bad(f"{folder}: there is something in it; name a folder that is new, so that no answer is lost")
    head, texts = read_texts()
    chosen = [exercise for exercise in texts if not only or exercise in only]
    folder.mkdir(parents=True, exist_ok=True)
    copy_code(folder)
    names = [name for exercise in chosen for name in EXERCISES.get(exercise, ())]
    path = folder / "videomar.py"
    path.write_text(blank(path.read_text(encoding="utf-8"), names), encoding="utf-8")
    head = head.replace("PROJECT", str(ROOT))
    text = "\n\n".join([head.strip(), *(texts[exercise][0] for exercise in chosen)])
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")
    print(f"{folder}: read README.md, and write {', '.join(names) or 'what it asks for'} in videomar.py")


def hint(exercise, which):
    _, texts = read_texts()
    if exercise not in texts:
        raise Bad(f"--hint {exercise}: there are the exercises {min(texts)} to {max(texts)}")
    _, hints = texts[exercise]
    if not hints:
        raise Bad(f"--hint {exercise}: exercise {exercise} has no hint")
    if not 1 <= which <= len(hints):
        raise Bad(f"--hint {exercise} {which}: exercise {exercise} has {len(hints)} hints")
    more = f" (more: --hint {exercise} {which + 1})" if which < len(hints) else ""
    print(hints[which - 1] + more)


# ------------------------------------------------------------------------------------------------------- grade
def run_limited(command, seconds, cwd, errors=subprocess.DEVNULL):
    """Runs a command, and ends its group of processes -> its exit code, or None if it took too long."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=environment, start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def grade_one(folder, exercise, limit):
    """What is wrong first, in words, or None. Whatever the submission prints or exits with does not count."""
    path = folder.resolve() / "videomar.py"
    if not path.is_file():
        return "there is no videomar.py in the folder"
    with tempfile.TemporaryDirectory() as scratch:
        verdict = Path(scratch) / "verdict"
        code = run_limited([TESTS / "assignment_checks.py", exercise, path, limit, verdict], limit, scratch)
        if code is None:
            return f"it did not come to an end in {limit:g} seconds (--limit; a busy machine takes longer)"
        if not verdict.exists():
            return f"it ended Python (exit code {code})"
        told = verdict.read_text("utf-8")
        return None if told == "right" else told or "its verdict could not be written; is the disk full?"


def grade(folders, limit, path, film, only=None):
    """Prints a line for each folder, and one for each exercise that is red.

    limit: seconds for a check; path: of a csv for the points, or None; film: whether to make one where all is green;
    only: the exercises to check, by default all.
    """
    exercises = [exercise for exercise in EXERCISES if not only or exercise in only]
    jobs = [(folder, exercise, limit) for folder in folders for exercise in exercises]
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(lambda job: grade_one(*job), jobs)
        for folder in folders:
            wrong = {exercise: next(reasons) for exercise in exercises}
            marks = ["red" if reason else "green" for reason in wrong.values()]
            line = "  ".join(f"{exercise} {mark}" for exercise, mark in zip(exercises, marks))
            print(f"{folder}: {marks.count('green')} of {len(marks)}: {line}", flush=True)
            errors = [f"{exercise} red: {reason}" for exercise, reason in wrong.items() if reason]
            for error in errors:
                print(f"    {error}", flush=True)
            rows.append([folder, *(int(mark == "green") for mark in marks), marks.count("green"), "\n".join(errors)])
    if path:
        table = io.StringIO()
        csv.writer(table).writerows([["folder", *exercises, "points", "errors"], *rows])
        write(path, lambda part: part.write_text(table.getvalue(), "utf-8", "backslashreplace"))
    for folder, *_, points, _ in rows:
        if film and not only and points == len(EXERCISES):
            try:
                make_film(folder)
            except (Bad, OSError) as e:  # the films of the others are made all the same
                print(f"    no film: {e}", flush=True)


# -------------------------------------------------------------------------------------------------- the reward
@cache  # ours is trained once for a whole class
def train_and_sample(source):
    """Trains a model of a videomar.py for 100 steps -> film strips of it, and of the shipped checkpoint run by it."""
    commands = [f"train.py --frames 5 --steps {STEPS} --out new",
                f"sample.py --img cat.png --frames {FRAMES} --ckpt new/videomar.pt --out new/cat.gif",
                f"sample.py --img cat.png --frames {FRAMES} --ckpt data/videomar.pt --out shipped/cat.gif"]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        copy_code(scratch)
        shutil.copyfile(source, scratch / "videomar.py")
        for command in commands:
            with (scratch / "errors").open("w+") as errors:
                if run_limited(command.split(), FILM_LIMIT, scratch, errors) != 0:
                    errors.seek(0)
                    lines = [line for line in errors.read().splitlines() if line.strip() and "%|" not in line]
                    reason = lines[-1] if lines else "?"  # the last line that is no progress bar
                    raise Bad(f"{source}: {command} did not end well: {reason}")
        return [Image.open(scratch / name / "cat-strip.png").convert("RGB") for name in ("new", "shipped")]


def make_film(folder):
    """Writes film-strip.png into the folder: their model after 100 steps, ours, the shipped one run by their code."""
    print(f"{folder}: all green. Its model and ours are trained for {STEPS} steps now: some minutes", flush=True)
    new, shipped = train_and_sample(folder / "videomar.py")
    rows = [new, train_and_sample(ROOT / "videomar.py")[0], shipped]
    strip = Image.new("RGB", (new.width, sum(row.height for row in rows) + 8), "white")
    for i, row in enumerate(rows):
        strip.paste(row, (0, i * (row.height + 4)))
    path = folder / "film-strip.png"
    write(path, lambda part: strip.save(part, "PNG"))
    print(f"wrote {path}: from the top its new model, ours, and the shipped checkpoint run by its code")


# ----------------------------------------------------------------------------------------------------- options
def options_parser():
    parser = Parser(description="Hand out the exercises of tests/assignments.md, and grade them.")
    parser.add_argument("--hint", type=int, nargs="+", metavar=("EXERCISE", "WHICH"), help="print a hint (none)")
    commands = parser.add_subparsers(dest="command", parser_class=Parser)
    one = commands.add_parser("start", help="write a folder with the exercises")
    one.add_argument("folder", type=Path, metavar="DIR", help="folder to write, which is new or empty")
    one.add_argument("--only", type=int, nargs="+", choices=range(1, 12),
                     help="these alone are blank; to be given after DIR (all)")
    many = commands.add_parser("grade", help="check folders")
    many.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders with a videomar.py each")
    many.add_argument("--only", type=int, nargs="+", choices=EXERCISES,
                      help="these exercises, and no film; to be given after DIR (all)")
    many.add_argument("--csv", type=Path, help="write points and errors to this file, a row for each folder (none)")
    many.add_argument("--limit", type=number(float, 1), default=30.0, help="seconds for each check (30)")
    many.add_argument("--no-film", action="store_true", help="train no model where all is green (off)")
    return parser


def main():
    a = options_parser().parse_args()
    if a.hint and len(a.hint) > 2:
        raise Bad("--hint: give the number of an exercise, and which of its hints")
    if a.hint:
        hint(a.hint[0], a.hint[1] if len(a.hint) > 1 else 1)
    elif a.command == "start":
        start(a.folder, a.only)
    elif a.command == "grade":
        for folder in a.folders:
            if not folder.is_dir():
                raise Bad(f"{folder}: no such folder; name the folders that the students handed in")
        if a.csv:
            check_writable(a.csv)
        grade(a.folders, a.limit, a.csv, not a.no_film, a.only)
    else:
        raise Bad("nothing to do: give start DIR, grade DIR..., or --hint EXERCISE")


if __name__ == "__main__":
    run(main)
