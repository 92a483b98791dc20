"""What of `make gpu` can be proven without a GPU: the runner, the bundle, the reading of traces, and dry runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as runner
from benchmarks.gpu import bundle, trace
from benchmarks.gpu.stages import FIGURES, STAGES, Stage
from benchmarks.kernel_cases import CASES

ROOT = Path(__file__).parents[1]

# The runner


def stage(name: str, code: str, estimate: int = 1, **options: Any) -> Stage:
    """A stage of one line of Python, the same on a GPU and on the host."""
    return Stage(name, "a test", estimate, ("-c", code, FIGURES), ("-c", code, FIGURES), **options)


WRITES = "import json, sys; json.dump({'launches': 7}, open(sys.argv[1], 'w')); "


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs stages as on a GPU of some name; gives the exit code and the results."""
    monkeypatch.setattr(runner, "_device", lambda: "NVIDIA H200")

    def run(*stages: Stage, options: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
        code = runner.main(["--output", str(tmp_path), *options], stages)
        path = tmp_path / "gpu_nvidia_h200.json"
        return code, json.loads(path.read_text())["stages"] if path.exists() else {}

    return run


def test_every_stage_runs_whatever_fails_before_it(run: Callable[..., Any], tmp_path: Path) -> None:
    code, results = run(
        stage("good", WRITES + "print('fine')"),
        stage("bad", WRITES + "sys.exit('no such kernel')"),
        stage("absent", "", wrapper=("no-such-checker", "--tool")),
        stage("wrapped", "", wrapper=("env",)),
        stage(
            "last",
            "import os, sys; sys.exit(os.environ['GPU_TESTS'] + os.environ['X'] != '12')",
            environment={"X": "2"},
        ),
    )
    assert code == 1
    found = {name: entry["status"] for name, entry in results.items()}
    assert found == {"good": "passed", "bad": "failed", "absent": "unavailable", "wrapped": "passed", "last": "passed"}
    assert results["good"]["figures"] == results["bad"]["figures"] == {"launches": 7}
    assert results["bad"]["tail"] == "no such kernel\n" and "tail" not in results["good"]
    assert results["absent"]["tail"] == "no-such-checker is not on the path"
    for entry in results.values():
        assert entry["device"] == "NVIDIA H200" and entry["versions"]["torch"] and entry["sources"]
    log = (tmp_path / "gpu_nvidia_h200.log").read_text()
    assert log.index("==== good\nfine") < log.index("==== bad\nno such kernel") < log.index("==== last")


def test_what_passed_is_not_run_again(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = tmp_path / "count"
    once = stage("once", f"open({str(counted)!r}, 'a').write('x')")
    fails = stage("fails", f"open({str(counted)!r}, 'a').write('f'); import sys; sys.exit(3)")
    for options, expected in (((), "xf"), ((), "xff"), (("--only", "once"), "xff"), (("--again",), "xffxf")):
        code, _ = run(once, fails, options=options)
        assert (code, counted.read_text()) == (0 if options == ("--only", "once") else 1, expected)
    monkeypatch.setattr(runner.figures, "sources_hash", lambda paths: "of other sources")
    run(once)
    assert counted.read_text() == "xffxfx"
    monkeypatch.setattr(runner, "_versions", lambda packages: {"torch": "another"})
    run(once)
    assert counted.read_text() == "xffxfxx"


def test_what_has_not_run_comes_before_what_failed(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails, new = stage("fails", "raise SystemExit(1)"), stage("new", "")
    run(fails)
    capsys.readouterr()
    run(fails, new)
    printed = capsys.readouterr().out
    assert printed.index("new:") < printed.index("fails:")


def test_a_file_of_something_else_is_not_replaced(run: Callable[..., Any], tmp_path: Path) -> None:
    other = tmp_path / "gpu_nvidia_h200.json"
    for content in ("[1, 2]", "{}", "{"):
        other.write_text(content)
        with pytest.raises(SystemExit, match="holds no results of stages; move it"):
            run(stage("any", ""))
        assert other.read_text() == content


def test_figures_that_were_cut_short_are_none(run: Callable[..., Any]) -> None:
    cut = "import sys; open(sys.argv[1], 'w').write({!r})"
    _, results = run(
        stage("json", cut.format('{"launches": 7, ')), stage("xml", cut.format('<?xml version="1.0"?><testsuites>'))
    )
    assert [results[name]["figures"] for name in ("json", "xml")] == [None, None]
    assert [results[name]["status"] for name in ("json", "xml")] == ["passed", "passed"]


def test_the_total_limit_ends_a_stage(run: Callable[..., Any]) -> None:
    began = time.monotonic()
    code, results = run(stage("hangs", "import time; time.sleep(60)"), options=("--seconds", "2"))
    assert code == 1 and results["hangs"]["status"] == "timed out" and time.monotonic() - began < 25


@pytest.fixture(params=[signal.SIG_IGN, signal.default_int_handler], ids=["background job", "foreground"])
def handles_interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handles_interrupts")
def test_a_stage_past_its_limit_may_still_report(run: Callable[..., Any]) -> None:
    """As pytest does when it is interrupted."""
    code = (
        "import json, sys, time\n"
        "try:\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    json.dump({'failures': 1}, open(sys.argv[1], 'w'))\n"
    )
    _, results = run(stage("tests", code, limit_seconds=4))
    assert results["tests"]["status"] == "timed out" and results["tests"]["figures"] == {"failures": 1}


def test_a_signal_ends_the_stage_that_runs(tmp_path: Path) -> None:
    child, script = tmp_path / "child", tmp_path / "script.py"
    script.write_text(
        f"""import sys
from benchmarks.gpu import __main__ as runner
from benchmarks.gpu.stages import Stage
runner._device = lambda: "a GPU"
command = ("-c", {f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)"!r})
sys.exit(runner.main(["--output", {str(tmp_path)!r}], [Stage("hangs", "a test", 1, command, command)]))
"""
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script)], cwd=ROOT, env=environment)
    while not child.exists() or not child.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 128 + 15
    with pytest.raises(ProcessLookupError):
        os.kill(int(child.read_text()), 0)


def test_results_are_written_after_each_stage(run: Callable[..., Any], tmp_path: Path) -> None:
    results = tmp_path / "gpu_nvidia_h200.json"
    code = f"import json; print(sorted(json.load(open({str(results)!r}))['stages'])); raise SystemExit(1)"
    _, found = run(stage("first", ""), stage("second", code))
    assert "['first']" in found["second"]["tail"]


def test_a_stage_past_its_limit_is_ended_with_all_that_it_started(run: Callable[..., Any], tmp_path: Path) -> None:
    child = tmp_path / "child"
    hangs = WRITES + (
        f"import subprocess, time; p = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(p.pid)); "
        "print('begun', flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    code, results = run(stage("hangs", hangs, limit_seconds=4), stage("next", ""))
    assert code == 1 and time.monotonic() - began < 30
    assert results["hangs"]["status"] == "timed out" and results["hangs"]["returncode"] is None
    assert results["hangs"]["figures"] == {"launches": 7} and results["hangs"]["tail"].startswith("begun\n")
    assert results["next"]["status"] == "passed"
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_no_stage_starts_that_would_not_end_in_time(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, results = run(stage("long", "", estimate=100), stage("short", "", estimate=10), options=("--seconds", "40"))
    assert code == 1 and list(results) == ["short"]
    assert "long: not started, 40 s are left" in capsys.readouterr().out


def test_without_a_gpu_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runner.main(["--output", str(tmp_path)], [stage("any", "")]) == 1
    assert "no GPU: nvidia-smi names none" in capsys.readouterr().err and not list(tmp_path.glob("*.json"))


def test_reports_of_tests_are_read(run: Callable[..., Any], tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text("def test_a(): pass\ndef test_b(): assert 1 == 2, 'wrong'\n")
    command = ("-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={FIGURES}", str(tests))
    _, results = run(Stage("tests", "a test", 1, command, command))
    figures = results["tests"]["figures"]
    assert (figures["tests"], figures["failures"], figures["skipped"]) == (2, 1, 0)
    (failure,) = figures["first_failures"]
    assert "test_b: AssertionError: wrong" in failure


# The stages


def test_stages_are_short_and_run_all_gpu_tests() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    assert all(10 <= stage.estimate_seconds < stage.limit_seconds for stage in STAGES)
    # With the demos left out, which only repeat on a GPU what CI does, all fit in the time that is asked for.
    measured = [stage for stage in STAGES if not stage.name.startswith("demo")]
    assert all(stage.limit_seconds == 120 for stage in measured)
    # Both benchmarks together measure every case once.
    options = [stage.command for stage in STAGES if "benchmarks.kernels" in stage.command]
    measured_cases = [
        (case.operator, case.name)
        for command in options
        for case in CASES
        if case.operator in command and ("--cases" not in command or case.name in command)
    ]
    assert sorted(measured_cases) == sorted((case.operator, case.name) for case in CASES)
    assert sum(stage.estimate_seconds for stage in measured) <= 930
    named = {part for stage in STAGES for part in stage.command}
    for path in (ROOT / "tests/gpu").glob("test_*.py"):
        assert f"tests/gpu/{path.name}" in named


def test_the_stages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{stage.name} .*\b{stage.estimate_seconds} s", printed, re.M) for stage in STAGES)


SCRIPTS = [stage.name for stage in STAGES if not stage.name.startswith("demo")]


@pytest.mark.full
@pytest.mark.parametrize("name", SCRIPTS)
def test_stages_start_on_the_host(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--only", name, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu_host.log").read_text()[-3000:]
    assert json.loads((tmp_path / "gpu_host.json").read_text())["stages"][name]["figures"]


# Traces


def event(category: str, name: str, begin: float, seconds: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin * 1e6, "dur": seconds * 1e6}


def test_a_trace_is_summed_up() -> None:
    """Two steps: two streams that overlap, a gap of 2 s in a span of 8 s, and two kinds of waits."""
    events = [
        event("kernel", "product", 10.0, 2.0),
        event("kernel", "sum", 11.0, 2.0),  # on another stream
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 13.0, 1.0) | {"args": {"correlation": 7}},
        event("kernel", "product", 16.0, 2.0),
        event("cuda_runtime", "cudaStreamSynchronize", 12.0, 0.5),
        event("cuda_runtime", "cudaStreamSynchronize", 14.0, 1.5),
        event("cuda_driver", "cuStreamSynchronize", 15.0, 0.25),
        event("cuda_runtime", "cudaLaunchKernel", 10.0, 0.1),
        event("cuda_driver", "cuLaunchKernelEx", 15.5, 0.1),
        event("cuda_runtime", "cudaDeviceSynchronize", 16.0, 2.0),  # of the profiler
        event("cuda_runtime", "cudaMemcpyAsync", 12.5, 0.5) | {"args": {"correlation": 7}},
        event("cuda_runtime", "cudaMemcpyAsync", 12.6, 0.9) | {"args": {"correlation": 8}},
        event("cpu_op", "aten::mm", 9.0, 5.0),
        {"ph": "M", "name": "process_name", "args": {}},
        {"ph": "i", "cat": "kernel", "name": "marker", "ts": 1e9},
    ]
    found = trace.summarize(reversed(events), num_steps=2)
    assert found["launches"] == 1.5 and found["copies"] == 0.5
    assert found["busy_seconds"] == pytest.approx(3.0) and found["span_seconds"] == pytest.approx(4.0)
    assert found["idle_share"] == pytest.approx(0.25)
    assert found["waits"] == {
        "cudaMemcpyAsync to pageable memory": {"number": 0.5, "seconds": pytest.approx(0.25)},
        "cuStreamSynchronize": {"number": 0.5, "seconds": pytest.approx(0.125)},
        "cudaStreamSynchronize": {"number": 1.0, "seconds": pytest.approx(1.0)},
    }
    assert [(row["name"], row["number"], row["seconds"]) for row in found["kernels"]] == [
        ("product", 1.0, pytest.approx(2.0)),
        ("sum", 0.5, pytest.approx(1.0)),
    ]
    assert trace.summarize([], 2)["idle_share"] is None


# The bundle

# What the project needs and containers of clusters bring, beside what `bundle.MISSING` holds.
BROUGHT = (
    "numpy packaging pillow psutil PyYAML safetensors tokenizers torch torchvision transformers pytest pytest-xdist"
)


def test_the_bundle_holds_what_containers_lack() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}
    needed |= {"liger-kernel", "emerging-optimizers", "absl-py", "pytest", "pytest-xdist"}
    assert needed == {*bundle.MISSING, *BROUGHT.split()}
    assert set(bundle.MISSING) <= set(bundle._pins(ROOT / "constraints.txt"))


def wheel(folder: Path, name: str, requires: str = "") -> None:
    """A package of one module."""
    folder.mkdir(parents=True, exist_ok=True)
    information = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "value = 41 + 1\n")
        file.writestr(
            f"{information}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" + f"Requires-Dist: {requires}\n" * bool(requires),
        )
        file.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{information}/RECORD", f"{name}.py,,\n{information}/METADATA,,\n{information}/WHEEL,,\n")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout with a built extension, as far as bundles look at it."""
    path = tmp_path / "checkout"
    (path / bundle.KERNELS).mkdir(parents=True)
    (path / "setup.py").write_text("def source_hash():\n    return 'abc'\n")
    (path / "constraints.txt").write_text("".join(f"{name}==1.0\n" for name in bundle.MISSING))
    (path / bundle.KERNELS / bundle.BINARY).write_bytes(b"binary")
    (path / bundle.KERNELS / bundle.BUILD_LOG).write_text("CUDA kernels: built for sm_90\nabc\n")
    return path


def test_a_bundle_is_made_and_installed_offline(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads = []
    run = subprocess.run

    def download(command: list[str], **options: Any) -> Any:
        if "download" not in command:
            return run(command, **options)
        downloads.append(command)
        wheel(
            Path(next(part for part in command if part.startswith("--dest=")).removeprefix("--dest=")), "some_package"
        )

    monkeypatch.setattr(subprocess, "run", download)
    folder = tmp_path / "bundle"
    for _ in range(2):  # an earlier one is replaced
        assert bundle.make(folder, repository) < bundle.MAX_BYTES
    assert [part for part in downloads[0] if "==" in part] == [f"{name}==1.0" for name in bundle.MISSING]
    assert sorted(path.name for path in folder.iterdir()) == [bundle.BINARY, bundle.BUILD_LOG, "wheels"]
    (repository / bundle.KERNELS / bundle.BINARY).unlink()
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")  # refuses connections
    packages = bundle.install(folder, repository)
    assert (repository / bundle.KERNELS / bundle.BINARY).read_bytes() == b"binary"
    environment = os.environ | {"PYTHONPATH": str(packages)}
    code = "import some_package; print(some_package.value)"
    assert run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout == "42\n"
    assert {"--no-deps", "--only-binary=:all:"} <= {*downloads[0]}
    monkeypatch.setattr(bundle, "MAX_BYTES", 10)
    with pytest.raises(SystemExit, match="more than 10"):
        bundle.make(folder, repository)
    assert (folder / "wheels").exists(), "the earlier one stays"


def test_stages_find_what_a_bundle_holds(
    repository: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run strictly and without a hub. Wheels that need others are taken as they are, offline."""
    folder = tmp_path / "bundle"
    wheel(folder / "wheels", "some_package", requires="not-to-be-had")
    for name in (bundle.BINARY, bundle.BUILD_LOG):
        (folder / name).write_bytes((repository / bundle.KERNELS / name).read_bytes())
    monkeypatch.setattr(runner, "REPOSITORY", repository)
    monkeypatch.setenv("PIP_USER", "1")
    names = ("MEGATRON_VLM_STRICT_KERNELS", "HF_HUB_OFFLINE", "GPU_TESTS")
    code = f"import os, some_package; print([os.environ[name] for name in {names}]); raise SystemExit(5)"
    _, results = run(stage("uses it", code), options=("--bundle", str(folder)))
    assert results["uses it"]["tail"] == "['1', '1', '1']\n"


def test_a_bundle_of_other_sources_is_refused(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    (folder / "wheels").mkdir(parents=True)
    with pytest.raises(SystemExit, match="is no bundle: `make gpu_bundle` makes one"):
        bundle.install(folder, repository)
    (folder / bundle.BINARY).write_bytes(b"older")
    (folder / bundle.BUILD_LOG).write_text("CUDA kernels: built for sm_90\ndef\n")
    with pytest.raises(SystemExit, match="was built from other sources"):
        bundle.install(folder, repository)
    assert (repository / bundle.KERNELS / bundle.BINARY).read_bytes() == b"binary"


def test_nothing_else_is_replaced_by_a_bundle(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "one.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="holds something else than a bundle"):
        bundle.make(folder, repository)
    (repository / bundle.KERNELS / bundle.BINARY).unlink()
    with pytest.raises(SystemExit, match="does not exist: `make install` builds it"):
        bundle.make(tmp_path / "new", repository)
    assert (folder / "one.png").exists() and not (tmp_path / "new").exists()
