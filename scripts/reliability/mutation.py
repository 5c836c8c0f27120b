"""Change the package in one place at a time, and count the changes that no test notices.

    python -m scripts.reliability.mutation sample=200 seed=0 out=mutants.json

The changes are those of mutmut, without those of the text of messages. For each, the tests that run
the changed line are run in a process of its own, the fastest first, until one fails. Nothing is
written: the process replaces the code of the function in memory. Needs mutmut and pytest-cov.
"""

import functools
import importlib
import inspect
import json
import os
import random
import signal
import time
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast
from unittest import mock

from repvgg import cli

MODULES = ("reparam", "losses", "verify", "fusion", "checkpoint")
TESTS = (
    *("tests/test_reparam.py", "tests/test_losses.py", "tests/test_verify.py"),
    *("tests/test_rdrop.py", "tests/fusion", "tests/checkpoint", "tests/models"),
    *("tests/hostile/test_checkpoints.py", "tests/hostile/test_numerics.py"),
)
SLOW = 5.0  # seconds of a test above which it is left out
DEFAULTS: cli.Config = {
    "modules": [*MODULES],
    "sample": 0,  # of each module with more; 0 is all
    "seed": 0,
    "workers": 2,
    "most": 80,  # tests that a mutant gets, the fastest
    "cache": "runs/mutation",
    "out": None,
}


@dataclass
class Mutant:
    """One change, and what came of it.

    Attributes:
        function: its qualified name.
        before, after: the changed code.
        outcome: "killed", "timed out", "survived", or "not run" by any test.
    """

    module: str
    file: str
    line: int
    function: str
    before: str
    after: str
    source: str
    outcome: str = ""
    tests: int = 0


def main() -> None:
    cli.script(mutate, str(__doc__), DEFAULTS)


def mutate(settings: dict[str, object]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    cache = Path(str(settings["cache"]))
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "durations.json").is_file():
        record(cache)
    chosen = random.Random(int(str(settings["seed"])))
    mutants: list[Mutant] = []
    for module in settings["modules"]:  # type: ignore[attr-defined]  # a list, as the default is
        found = [one for file in files(str(module)) for one in changes(str(module), file)]
        total, size = len(found), int(str(settings["sample"]))
        if size and total > size:
            found = [found[at] for at in sorted(chosen.sample(range(total), size))]
        mutants += [make() for make in found]
        print(f"{module}: {len(found)} of {total} mutants", flush=True)
    start = time.monotonic()
    run(mutants, cache, int(str(settings["workers"])), int(str(settings["most"])))
    report(mutants, time.monotonic() - start)
    if settings["out"] is not None:
        rows = [{k: v for k, v in asdict(one).items() if k != "source"} for one in mutants]
        Path(str(settings["out"])).write_text(json.dumps(rows, indent=1) + "\n")


def files(module: str) -> list[Path]:
    place = Path("repvgg", module)
    return sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def changes(module: str, file: Path) -> Iterator[Callable[[], Mutant]]:
    """What makes every mutant of a file, apart from those of the text of messages."""
    import libcst
    from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
    from mutmut.mutation import pragma_handling
    from mutmut.mutation.file_mutation import Mutation, create_mutations

    plain = types.SimpleNamespace(do_not_mutate_patterns=[])  # no project of mutmut's
    with mock.patch.object(pragma_handling, "config", return_value=plain):
        tree, found, _, _ = create_mutations(str(file), file.read_text())
    wrapper = MetadataWrapper(tree, unsafe_skip_copy=True)
    parents = wrapper.resolve(ParentNodeProvider)
    positions = wrapper.resolve(PositionProvider)
    for one in found:
        names: list[str] = []
        is_message = False
        node: libcst.CSTNode | None = one.original_node
        while node is not None and (node := parents.get(node)) is not None:
            if isinstance(node, libcst.FunctionDef | libcst.ClassDef):
                names.append(node.name.value)
            is_message |= isinstance(node, libcst.Raise | libcst.FormattedString)
        text_changed = isinstance(one.original_node, libcst.SimpleString)
        if one.contained_by_top_level_function is None or (is_message and text_changed):
            continue
        place = positions[one.original_node].start.line, ".".join(reversed(names))

        def make(one: Mutation = one, place: tuple[int, str] = place) -> Mutant:
            old, new = one.original_node, one.mutated_node
            changed = cast(libcst.Module, tree.deep_replace(old, new))
            shown = tree.code_for_node(old), tree.code_for_node(new)
            return Mutant(module, str(file), *place, *shown, changed.code)

        yield make


def record(cache: Path) -> None:
    """Run the tests once: the lines that each runs, and its seconds."""
    import pytest

    class Recorder:
        def __init__(self) -> None:
            self.seconds: defaultdict[str, float] = defaultdict(float)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            self.seconds[report.nodeid] += report.duration

    if os.fork() == 0:
        os.environ["COVERAGE_FILE"] = str(cache / "coverage")
        recorder = Recorder()
        options = ["--cov=repvgg", "--cov-context=test", "--cov-report="]
        status = pytest.main([*arguments(), *options], plugins=[recorder])
        (cache / "durations.json").write_text(json.dumps(recorder.seconds))
        os._exit(int(status))
    if os.wait()[1] != 0:
        raise ValueError("the tests fail without any change")


def arguments() -> list[str]:
    given = [test for test in TESTS if Path(test).exists()]
    return ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", *given]


def run(mutants: list[Mutant], cache: Path, workers: int, most: int) -> None:
    """Run the tests of every mutant, `workers` at a time."""
    import pytest
    from coverage import CoverageData

    data = CoverageData(str(cache / "coverage"))
    data.read()
    seconds = json.loads((cache / "durations.json").read_text())
    lines = {
        Path(file).relative_to(Path.cwd()).as_posix(): data.contexts_by_lineno(file)
        for file in data.measured_files()
    }

    class Runner:
        def pytest_runtestloop(self, session: pytest.Session) -> bool:
            items = {item.nodeid: item for item in session.items}
            session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
            running: dict[int, tuple[Mutant, float]] = {}
            for number, mutant in enumerate(mutants):
                contexts = lines.get(mutant.file, {}).get(mutant.line, [])
                names = {context.partition("|")[0] for context in contexts} & items.keys()
                names = {name for name in names if seconds.get(name, 0) < SLOW}
                chosen = [items[name] for name in sorted(names, key=lambda n: seconds.get(n, 0))]
                chosen = chosen[:most]
                mutant.tests = len(chosen)
                if not chosen:
                    mutant.outcome = "not run"
                    print(shown(mutant), flush=True)
                    continue
                limit = 20 + 5 * sum(seconds.get(item.nodeid, 0) for item in chosen)
                if pid := os.fork():
                    running[pid] = mutant, time.monotonic() + limit
                else:
                    os._exit(attempt(mutant, chosen))
                while len(running) >= workers:
                    collect(running)
                if number % 50 == 0:
                    print(number, Counter(one.outcome for one in mutants), flush=True)
            while running:
                collect(running)
            return True

    pytest.main(arguments(), plugins=[Runner()])


def shown(mutant: Mutant) -> str:
    before, after = (" ".join(text.split())[:90] for text in (mutant.before, mutant.after))
    place = f"{mutant.file}:{mutant.line} {mutant.function}"
    return f"{place}: {before}  ->  {after} [{mutant.outcome}, {mutant.tests} tests]"


def collect(running: dict[int, tuple[Mutant, float]]) -> None:
    """Wait for a child, and end those that run too long."""
    for pid, (mutant, deadline) in list(running.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            mutant.outcome = "survived" if status == 0 else "killed"
            if status == 0:
                print(shown(mutant), flush=True)
            del running[pid]
        elif time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            mutant.outcome = "timed out"
            del running[pid]
    time.sleep(0.005)


def attempt(mutant: Mutant, items: list) -> int:  # type: ignore[type-arg]  # of pytest
    """Run tests with a mutant; 1 as soon as one fails, 0 if none does."""
    os.setpgrp()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        replace(mutant)
        failed = []

        class Watch:
            def pytest_runtest_logreport(self, report: object) -> None:
                if report.failed:  # type: ignore[attr-defined]
                    failed.append(report)

        items[0].config.pluginmanager.register(Watch())
        for item, after in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if failed:
                return 1
    except BaseException:
        return 1
    return 0


def replace(mutant: Mutant) -> None:
    """Give the function of a mutant its changed code, in this process."""
    name = ".".join(Path(mutant.file).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    parts = mutant.function.split(".")
    changed: types.CodeType = compile(mutant.source, mutant.file, "exec")
    found: object = module
    for depth, part in enumerate(parts):
        changed = next(
            code
            for code in changed.co_consts
            if isinstance(code, types.CodeType) and code.co_name == part
        )
        found = inspect.getattr_static(found, part)
        if not inspect.isclass(found):  # what is inside a function is in its code
            del parts[depth + 1 :]
            break
    for function in functions(found):
        function.__code__ = changed
        return
    raise AssertionError(f"{mutant.function} is no function")


def functions(found: object) -> Iterator[types.FunctionType]:
    """The function inside decorators and descriptors."""
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, classmethod | staticmethod):
        found = found.__func__
    elif isinstance(found, functools.cached_property):
        found = found.func
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    if isinstance(found, types.FunctionType):
        yield found


def report(mutants: list[Mutant], seconds: float) -> None:
    """Print a table by module."""
    print(f"\n{'module':<12}{'mutants':>9}{'killed':>9}{'survived':>10}{'score':>9}")
    for module in [*dict.fromkeys(one.module for one in mutants), "all"]:
        own = [one for one in mutants if module in (one.module, "all")]
        killed = sum(one.outcome in ("killed", "timed out") for one in own)
        share = 100 * killed / len(own)
        print(f"{module:<12}{len(own):>9}{killed:>9}{len(own) - killed:>10}{share:>8.1f}%")
    print(f"{seconds:.0f} s")


if __name__ == "__main__":
    main()
