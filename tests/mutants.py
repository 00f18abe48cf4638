"""
Do the tests notice small changes of the code? A seeded sample of spots is changed, one at a time: a comparison, a sign,
a number, an `and`. The quick tests that run the changed line must fail.

    python tests/mutants.py --number 200 --seed 0

The operators are those of cosmic-ray. Which tests run which line is measured once and kept in `.mutants`; `--map`
measures it again. Each change is tried in a forked process, which has torch and transformers imported already, and only
in memory: no file is changed. Changes that cannot be noticed are in `equivalent_mutants.yaml`, with the reason.
"""

import argparse
import ast
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mm_transformers"
ROOMS = ("model", "data", "training", "analysis")
FOLDER = ROOT / ".mutants"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.yaml")
MAX_TESTS = 60
QUICK = "not slow and not nightly"
# All of these are imported before the first fork; none of them imports the package.
PRELOADED = (
    "torch", "transformers", "transformers.modeling_utils", "transformers.trainer", "transformers.pipelines",
    "transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert",
    "transformers.models.vit.modeling_vit", "transformers.models.marian.modeling_marian",
    "transformers.models.bart.modeling_bart", "datasets", "evaluate", "accelerate", "sklearn.linear_model", "pandas",
    "hypothesis", "PIL.Image", "matplotlib",
)  # fmt: skip
OPERATORS = [
    *(f"ReplaceComparisonOperator_{a}_{b}" for a, b in (
        ("Eq", "NotEq"), ("NotEq", "Eq"), ("Lt", "LtE"), ("Lt", "Gt"), ("LtE", "Lt"), ("LtE", "GtE"), ("Gt", "GtE"),
        ("Gt", "Lt"), ("GtE", "Gt"), ("GtE", "LtE"), ("Is", "IsNot"), ("IsNot", "Is"),
    )),
    *(f"ReplaceBinaryOperator_{a}_{b}" for a, b in (
        ("Add", "Sub"), ("Sub", "Add"), ("Mul", "Div"), ("Div", "Mul"), ("FloorDiv", "Div"), ("Mod", "FloorDiv"),
        ("Pow", "Mul"), ("BitAnd", "BitOr"), ("BitOr", "BitAnd"),
    )),
    "ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Invert", "ReplaceUnaryOperator_Delete_Not",
    "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer", "ZeroIterationForLoop",
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A changed file, its changed line before and after, and the tests that run the line, the fastest first."""

    file: str
    line: int
    was: str
    becomes: str
    source: str
    tests: tuple[str, ...]


# Which tests run which line


class Durations:
    """A pytest plugin: the seconds of each test that passes."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self):
        passed = {name: seconds for name, seconds in self.seconds.items() if name not in self.failed}
        (FOLDER / "seconds.json").write_text(json.dumps(passed))


def measure() -> None:
    """Run the quick tests with a coverage context for each test."""
    import pytest

    FOLDER.mkdir(exist_ok=True)
    os.environ["COVERAGE_FILE"] = str(FOLDER / "coverage")
    options = ["--numprocesses", "auto", "--maxprocesses", "4", "--dist", "worksteal", "-q", "-m", QUICK]
    pytest.main([*options, "--cov", "--cov-context=test", "--cov-report=", str(ROOT / "tests")], plugins=[Durations()])


def tests_of_lines(path: Path, coverage_data, seconds: dict[str, float]) -> dict[int, list[str]]:
    """Line -> the tests that run it, the fastest first."""
    found = {}
    for line, contexts in coverage_data.contexts_by_lineno(str(path)).items():
        tests = {context.partition("|")[0] for context in contexts} & seconds.keys()
        if tests:
            found[line] = sorted(tests, key=lambda name: (seconds[name], name))
    return found


# Changes


def spots(source: str, lines: set[int], operators: dict[str, type]) -> Iterator[tuple[tuple[int, int], str, int]]:
    """((line, column), name of the operator, number of its occurrence) within the bodies of functions."""
    from cosmic_ray.ast import ast_nodes, get_ast

    allowed, text = lines & _lines_of_bodies(source), source.splitlines()
    counts: Counter = Counter()
    for node in ast_nodes(get_ast(source)):
        for name, operator in operators.items():
            for start, _ in operator().mutation_positions(node):
                # `zip(..., strict=True)` asserts what always holds, so its absence cannot be noticed.
                if start[0] in allowed and not text[start[0] - 1][: start[1]].endswith("strict="):
                    yield start, name, counts[name]
                counts[name] += 1


def _lines_of_bodies(source: str) -> set[int]:
    """The lines of statements in functions; signatures, docstrings and annotations run or say nothing."""
    found: set[int] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for statement in node.body:
                found |= set(range(statement.lineno, statement.end_lineno + 1))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found -= set(range(node.lineno, node.body[0].lineno))
        if isinstance(node, ast.AnnAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            found -= set(range(node.lineno, node.end_lineno + 1))
    return found


def sample(number: int, seed: int, only: str = "") -> list[Mutant]:
    """Spots at random, all equally likely, and one change of each."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider
    from coverage import CoverageData

    seconds = json.loads((FOLDER / "seconds.json").read_text())
    data = CoverageData(str(FOLDER / "coverage"))
    data.read()
    provider = OperatorProvider()
    operators = {name: provider[name] for name in OPERATORS}
    at: dict[tuple[str, tuple[int, int]], list[tuple[str, int]]] = defaultdict(list)
    sources, tests = {}, {}
    for path in (path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py"))):
        name = path.relative_to(ROOT).as_posix()
        if only not in name:
            continue
        sources[name], tests[name] = path.read_text(encoding="utf-8"), tests_of_lines(path, data, seconds)
        for place, operator, occurrence in spots(sources[name], set(tests[name]), operators):
            at[name, place].append((operator, occurrence))
    generator = random.Random(seed)
    places = sorted(at)
    generator.shuffle(places)
    found = []
    for name, place in places:
        operator, occurrence = generator.choice(at[name, place])
        changed = mutate_code(sources[name], operators[operator](), occurrence)
        if _is_another_program(sources[name], changed):
            was, becomes = _changed_line(sources[name], changed)
            chosen = tuple(tests[name][place[0]][:MAX_TESTS])
            found.append(Mutant(name, place[0], was, becomes, changed, chosen))
        if len(found) == number:
            break
    return found


def _is_another_program(source: str, changed: str | None) -> bool:
    try:
        return changed is not None and ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def _changed_line(source: str, changed: str) -> tuple[str, str]:
    pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
    return next((was.strip(), " ".join(now.split())) for was, now in pairs if was != now)


# Trying them


class FirstFailure:
    """A pytest plugin: the first test that fails."""

    name = ""

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.name:
            self.name = report.nodeid


class Trial:
    """Tests in a forked process, with one file changed in memory."""

    def __init__(self, number: int, file: str, source: str, tests: tuple[str, ...], seconds: float):
        self.output = FOLDER / f"{number}.log"
        self.told = FOLDER / f"{number}.json"
        self.told.unlink(missing_ok=True)
        self.end = time.monotonic() + seconds
        self.pid = os.fork()
        if self.pid == 0:
            code = 3
            try:
                code = self._run(file, source, tests)
            finally:
                os._exit(code)

    def _run(self, file: str, source: str, tests: tuple[str, ...]) -> int:
        import hypothesis
        import pytest

        os.setsid()
        descriptor = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(ROOT)
        hypothesis.settings.register_profile("mutants", deadline=None, database=None)
        get_code = SourceFileLoader.get_code

        def changed_code(loader, name):
            if source and Path(loader.path) == ROOT / file:
                return compile(source, loader.path, "exec", dont_inherit=True)
            return get_code(loader, name)

        SourceFileLoader.get_code = changed_code  # type: ignore[method-assign]
        options = ["-x", "-q", "-p", "no:cacheprovider", "--override-ini", "addopts=--strict-markers"]
        options += ["--hypothesis-profile", "mutants"]
        code = int(pytest.main([*options, *tests], plugins=[first := FirstFailure()]))
        self.told.write_text(json.dumps({"code": code, "test": first.name}))
        return code

    def result(self) -> tuple[str, str] | None:
        """("noticed", the test that failed), ("unnoticed", "") or ("timeout", ""); None as long as it runs."""
        if os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.monotonic() < self.end:
                return None
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return "timeout", ""
        # A process that dies without a word was ended by the change.
        told = json.loads(self.told.read_text()) if self.told.exists() else {"code": 3, "test": ""}
        return ("unnoticed" if told["code"] in (0, 5) else "noticed"), told["test"]


def try_all(mutants: list[Mutant], processes: int) -> Iterator[tuple[Mutant, str, str]]:
    """
    Each mutant, what became of it, and the test that failed.

    A test that fails without the change, too, notices nothing: it is left out and the mutant is tried again.
    """
    seconds = json.loads((FOLDER / "seconds.json").read_text())
    waiting = list(enumerate(mutants))[::-1]
    running: list[tuple[int, Mutant, Trial, str]] = []
    sound: dict[str, bool] = {}
    number = 0

    def start(mutant: Mutant, suspect: str = "") -> None:
        nonlocal number
        number += 1
        tests = (suspect,) if suspect else tuple(name for name in mutant.tests if sound.get(name, True))
        limit = 120 + 10 * sum(seconds[name] for name in tests)
        source = "" if suspect else mutant.source
        running.append((number, mutant, Trial(number, mutant.file, source, tests, limit), suspect))

    while waiting or running:
        while waiting and len(running) < processes:
            start(waiting.pop()[1])
        time.sleep(0.05)
        for entry in list(running):
            _, mutant, trial, suspect = entry
            result = trial.result()
            if result is None:
                continue
            running.remove(entry)
            outcome, test = result
            if suspect:
                sound[suspect] = outcome == "unnoticed"
                if sound[suspect]:
                    yield mutant, "noticed", suspect
                else:
                    start(mutant)
            elif outcome == "noticed" and test in seconds and test not in sound:
                start(mutant, test)
            else:
                yield mutant, outcome, test


def equivalent() -> set[tuple[str, str, str]]:
    """(file, line before, line after) of the changes that cannot be noticed."""
    import yaml

    return {(x["file"], x["was"], x["becomes"]) for x in yaml.safe_load(EQUIVALENT.read_text()) or []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=200, help="how many spots are changed (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument("--only", default="", help="a part of the path of the files that are changed")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--least", type=float, default=90.0, help="percent that must be noticed (90)")
    parser.add_argument("--map", action="store_true", help="measure again which tests run which line")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure()
    if args.map or not (FOLDER / "seconds.json").exists():
        # In a process of its own, since it imports the package.
        subprocess.run([sys.executable, __file__, "--measure"], check=True, cwd=ROOT)
    sys.dont_write_bytecode = False  # the tests are compiled once
    mutants, known = sample(args.number, args.seed, args.only), equivalent()
    for name in PRELOADED:
        importlib.import_module(name)
    counts: Counter = Counter()
    with (FOLDER / "results.tsv").open("w", encoding="utf-8") as table:
        print("outcome", "file", "line", "was", "becomes", "test", sep="\t", file=table)
        for mutant, found, test in try_all(mutants, args.processes):
            is_known = found == "unnoticed" and (mutant.file, mutant.was, mutant.becomes) in known
            outcome = "equivalent" if is_known else found
            counts[outcome] += 1
            row = (outcome, mutant.file, str(mutant.line), mutant.was, mutant.becomes, test)
            print(*row, sep="\t", file=table, flush=True)
            print(f"{sum(counts.values()):4d} {outcome:10s} {mutant.file}:{mutant.line}", flush=True)
            if outcome == "unnoticed":
                print(f"       - {mutant.was}\n       + {mutant.becomes}", flush=True)
    judged = counts.total() - counts["equivalent"]
    share = 100 * (counts["noticed"] + counts["timeout"]) / max(judged, 1)
    told = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    print(f"{told}: {share:.1f}% of {judged} noticed or timed out. The table is {FOLDER / 'results.tsv'}.")
    sys.exit(share < args.least)


if __name__ == "__main__":
    main()
