"The runner: typed parameters, skipping, resuming, failing, stopping; on tiny notebooks made here."
import base64
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from hypothesis import given, strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from matfm.core import BadInput, UnknownName
from matfm.run import runner
from matfm.run.results import ExperimentSpec, Result
from matfm.settings import load_settings

RECORD = """
import os, time
from pathlib import Path
from matfm.run.results import record
rec = record("e01_toy", dict(seed=seed))
with open("started.txt", "a") as f: f.write(f"{seed}\\n")
"""
FINISH = "rec.metric('seed', float(seed), n=1, threads=os.environ['OMP_NUM_THREADS']); rec.save()"


@pytest.fixture
def space(tmp_path, monkeypatch):
    "A workspace in a folder with spaces and braces."
    root = tmp_path / "my {work} space"
    (root / "nbs" / "experiments" / "params").mkdir(parents=True)
    (root / "settings.ini").write_text("[run]\nstore = runs\n")
    monkeypatch.chdir(root)
    for k in [k for k in os.environ if k.startswith("MATFM_")] + ["OMP_NUM_THREADS"]: monkeypatch.delenv(k, raising=False)
    return root


def experiment(root, *cells, parameters='seed = 0\nlr: float = 1e-3\nname = "a"\nwidths = [1, 2]\nlong = False'):
    "Write nbs/experiments/e01_toy.ipynb: parameters, record, the cells given, save."
    tagged = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nb = new_notebook(cells=[new_markdown_cell("# Toy"), tagged, *map(new_code_cell, (RECORD, *cells, FINISH))])
    path = root / "nbs" / "experiments" / "e01_toy.ipynb"
    nbformat.write(nb, path)
    return path


def started(root): return sorted(int(s) for s in (root / "nbs" / "experiments" / "started.txt").read_text().split())


def folder_of(root, **parameters): return root / "runs" / runner.expand(root / "nbs" / "experiments" / "e01_toy.ipynb", parameters)[0].key


@pytest.fixture
def shell(space):
    "Start `matfm` as a process of its own, in its own group; whatever still runs at the end is killed."
    started_here = []
    def start(*arguments):
        started_here.append(subprocess.Popen([sys.executable, "-c", "from matfm.app.cli import main; main()", *arguments], cwd=space, text=True,
                                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)))  # heard even where these tests run in the background
        return started_here[-1]
    yield start
    for p in started_here:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)


def wait_for(condition, seconds=240.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def assert_gone(family, seconds=30.0):
    "Not one of these processes is left."
    assert not (left := psutil.wait_procs(family, timeout=seconds)[1]), left


# --- parameters -------------------------------------------------------------------------------------------------------

def test_unknown_parameter_is_refused_before_anything_runs(space):
    experiment(space)
    with pytest.raises(UnknownName, match="unknown parameter of e01_toy 'sed'; did you mean 'seed'"): runner.run("e01_toy", {"sed": 1})
    assert not (space / "runs").exists()


def test_values_follow_the_type_of_the_default(space):
    path = experiment(space)
    specs = runner.expand(path, runner.parse_assignments(["seed=1,2,3,lr=1e-2", "name=007", "long=true"]))
    assert [s.parameters["seed"] for s in specs] == [1, 2, 3]
    assert specs[0].parameters == {"seed": 1, "lr": 0.01, "name": "007", "widths": [1, 2], "long": True}
    assert [s.parameters["widths"] for s in runner.expand(path, runner.parse_assignments(["widths=[8],[16,32]"]))] == [[8], [16, 32]]
    for wrong in ("seed=0.5", "seed=", "lr=fast", "long=perhaps", "widths=8", "widths={a: 1}"):
        with pytest.raises(BadInput, match=f"{wrong.split('=')[0]} must be"): runner.expand(path, runner.parse_assignments([wrong]))


def test_presets_lie_between_defaults_and_arguments(space):
    path = experiment(space)
    (space / "nbs/experiments/params/e01_toy.yaml").write_text("full:\n  seed: [1, 2]\n  lr: 1e-2\nbad:\n  sede: 1\n")
    assert [s.parameters["seed"] for s in runner.expand(path, {}, "full")] == [1, 2]
    only = runner.expand(path, {"seed": 7}, "full")
    assert len(only) == 1 and only[0].parameters["lr"] == 0.01
    with pytest.raises(UnknownName, match="did you mean 'full'"): runner.expand(path, {}, "ful")
    with pytest.raises(UnknownName, match="did you mean 'seed'"): runner.expand(path, {}, "bad")


def test_notebooks_without_usable_parameters_are_refused(space):
    with pytest.raises(BadInput, match="must be a literal"): runner.parameters_of(experiment(space, parameters="seed = 2 + 3 * len('x')"))
    path = experiment(space)
    nb = json.loads(path.read_text())
    nb["cells"][1]["metadata"] = {}
    path.write_text(json.dumps(nb))
    with pytest.raises(BadInput, match="needs one cell tagged 'parameters'"): runner.parameters_of(path)


@given(st.lists(st.integers(), min_size=1), st.text(st.characters(blacklist_characters="\"'\\", blacklist_categories=["Cs", "Cc"]), max_size=20))
def test_assignments_survive_quoting(numbers, text):
    parsed = runner.parse_assignments([f"a={','.join(map(str, numbers))},b=\"{text}\""])
    a, b = runner.Parameter("a", 0, int), runner.Parameter("b", "", str)
    assert [runner.cast(a, v) for v in parsed["a"]] == numbers
    assert [runner.cast(b, v) for v in parsed["b"]] == [text]


# --- running ----------------------------------------------------------------------------------------------------------

def test_a_sweep_runs_each_once_and_reports(space):
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(8)).decode()
    experiment(space, f"from IPython.display import Image, display; import base64\nsecret_code = 1\ndisplay(Image(data=base64.b64decode('{png}')))")
    results = runner.sweep("e01_toy", {"seed": [3, 4]}, jobs=1, progress=False)
    assert [r.metrics[0].value for r in results] == [3.0, 4.0] and started(space) == [3, 4]
    assert runner.sweep("e01_toy", {"seed": [3, 4]}, jobs=2, progress=False) == results and started(space) == [3, 4]
    folder = folder_of(space, seed=3)
    assert Result.load(folder).spec.parameters == {"seed": 3, "lr": 1e-3, "name": "a", "widths": [1, 2], "long": False}
    report = (folder / "report.html").read_text()
    assert f"data:image/png;base64,{png}" in report and "e01_toy" in report and "secret_code" not in report
    assert runner.run("e01_toy", {"seed": 3}, force=True, progress=False).metrics == results[0].metrics and started(space) == [3, 3, 4]


def test_a_failing_notebook_keeps_its_traceback_and_is_tried_again(space):
    experiment(space, "if not Path('mended').exists(): raise ValueError('a broken thing')")
    for _ in range(2):
        with pytest.raises(runner.RunFailed, match="ValueError: a broken thing") as e: runner.run("e01_toy", progress=False)
    assert "raise ValueError" in e.value.result.notes and "\x1b" not in e.value.result.notes
    status = runner.read_status(e.value.folder)
    assert status.state == "failed" and "a broken thing" in status.error
    errors = [o for c in nbformat.read(e.value.folder / "notebook.ipynb", 4).cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert errors[0].ename == "ValueError"
    (space / "nbs/experiments/mended").touch()
    assert runner.run("e01_toy", progress=False).status == "ok" and runner.list_runs()[0]["state"] == "ok"


def test_a_dying_kernel_and_a_missing_result_are_failures(space):
    experiment(space, "if seed == 1: os._exit(3)", "if seed == 2: rec.save = lambda: None")
    dead, mute = runner.sweep("e01_toy", {"seed": [1, 2]}, jobs=1, progress=False)
    assert dead.status == mute.status == "failed"
    assert "Kernel died" in dead.notes and "without saving a result" in mute.notes


def test_a_run_in_progress_is_not_started_twice(space, monkeypatch):
    experiment(space)
    monkeypatch.setattr(runner, "is_alive", lambda folder: True)
    monkeypatch.setattr(runner.time, "sleep", lambda s: None)
    with pytest.raises(BadInput, match="is being run by process"): runner.run("e01_toy")


# --- stopping and going on --------------------------------------------------------------------------------------------

BLOCK = """
(rec.work / "checkpoint").touch() if not (before := (rec.work / "checkpoint").exists()) else None
try:
    while seed == 2 and not Path("go").exists(): time.sleep(0.1)
finally: (rec.work / "finally").touch()
rec.table("resumed", [{"before": before}])
"""


def test_a_sweep_killed_outright_goes_on_where_it_was(space, shell):
    experiment(space, BLOCK)
    command = ("run", "e01_toy", "-p", "seed=0,1,2", "--jobs", "2")
    first = shell(*command)
    done = [folder_of(space, seed=s) for s in (0, 1)]
    last = folder_of(space, seed=2)
    wait_for(lambda: all(runner.is_done(f) for f in done) and (last / "work" / "checkpoint").exists())
    assert runner.is_alive(last)
    family = psutil.Process(first.pid).children(recursive=True)  # workers and kernels
    first.send_signal(signal.SIGKILL)
    first.communicate()
    wait_for(lambda: not runner.is_alive(last))
    assert_gone(family)
    assert [row["state"] for row in runner.list_runs() if row["run"] == last.name] == ["cut off"]
    (space / "nbs/experiments/go").touch()
    second = shell(*command)
    out, err = second.communicate(timeout=240)
    assert second.returncode == 0, err
    assert started(space) == [0, 1, 2, 2] and "3 of 3 runs are done" in out and err.count("is done") == 2
    assert Result.load(last).tables["resumed"] == [{"before": True}]
    assert {f.name for f in last.iterdir()} == {"kernel.log", "notebook.ipynb", "report.html", "result.json", "status.json", "work"}


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_run_repeated(space, shell):
    experiment(space, BLOCK)
    process = shell("run", "e01_toy", "-p", "seed=2,0", "--jobs", "2")
    folder = folder_of(space, seed=2)
    wait_for(lambda: (folder / "work" / "checkpoint").exists())
    victim = runner.read_status(folder).pid
    assert victim != process.pid
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: started(space).count(2) == 2)
    (space / "nbs/experiments/go").touch()
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "2 of 2 runs are done" in out, err
    assert Result.load(folder).tables["resumed"] == [{"before": True}]


@pytest.mark.parametrize("jobs, seeds", [(1, "2"), pytest.param(2, "2,0", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_nothing_half_done(space, shell, jobs, seeds):
    experiment(space, BLOCK)
    process = shell("run", "e01_toy", "-p", f"seed={seeds}", "--jobs", str(jobs))
    folder = folder_of(space, seed=2)
    wait_for(lambda: (folder / "work" / "checkpoint").exists())
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted" in err.strip().splitlines()[-1], err
    assert "Traceback" not in err and "Error" not in err, err
    assert (folder / "work" / "finally").exists(), "the cell's own clean-up ran"
    assert runner.read_status(folder).state == "interrupted" and not runner.is_done(folder)
    assert_gone(family)
    assert {f.name for f in folder.iterdir()} <= {"kernel.log", "notebook.ipynb", "result.json", "status.json", "work"}
    for f in folder.glob("*.ipynb"): nbformat.validate(nbformat.read(f, 4))


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="a console of Windows has no signal masks")
def test_ctrl_c_waits_while_workers_are_born():
    born = None
    with pytest.raises(KeyboardInterrupt), runner._ctrl_c_held(), runner._born_deaf():
        os.kill(os.getpid(), signal.SIGINT)
        code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
        born = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert born.strip() == "True" and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_disk_that_is_full_at_the_end_costs_one_line_and_no_work(space, monkeypatch):
    experiment(space, BLOCK)
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patch:
        patch.setattr(Result, "save", full)
        with pytest.raises(runner.CannotSave, match="No space left on device.*unharmed"): runner.run("e01_toy", progress=False)
    assert [row["state"] for row in runner.list_runs()] == ["cut off"]
    assert runner.run("e01_toy", progress=False).tables["resumed"] == [{"before": True}]


def test_threads_are_shared_fairly(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runner, "usable_cores", lambda: 8)
    settings = load_settings(env={})
    assert (runner.fair_threads(settings), runner.fair_threads(settings, 3), runner.fair_threads(settings, 20)) == (8, 2, 1)
    assert runner.fair_threads(settings.replace(train_threads=5), 3) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert runner.fair_threads(settings) == 7


def test_keys_are_safe_file_names(): assert re.fullmatch(r"[\w-]+", ExperimentSpec("e01_toy", {"a": "../ü"}).key)
