"""The benchmark of the CUDA paths on the CPU: its rows run real commands, and what is wrong makes a row fail.

Its other rows take minutes on a CPU: `python benchmarks/gpu.py --device cpu`.
"""

import json
import math
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import warm
from packaging.requirements import Requirement
from safetensors.numpy import save_file

import gpu
from acceptance import commands, packages
from acceptance.commands import Run, check_trained_on, last_flags
from acceptance.jobs import Bench, CheckError, Job, Outcome, SkipError, wait_for_all
from acceptance.rows import Row, model, training
from acceptance.rows.compare import weight_difference
from acceptance.rows.model import same_captions
from acceptance.rows.speed import loop_speed, waiting
from acceptance.rows.training import fp32, half_precision
from acceptance.table import Finding, Table, run_row, run_rows

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
HANGS = "import time; time.sleep(60)"
LOSSES = [4.0, 3.5, 3.2, 3.0, 2.9, 2.8, 2.7, 2.6]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(device="cpu", folder=tmp_path / "bench", ends=time.monotonic() + 60, small=True)


def find(check: Callable[[Job], Outcome], bench: Bench, *, seconds: float = 30.0) -> Finding:
    return run_row(Row(name="a row", check=check, seconds=seconds), bench)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def write_run(folder: Path, losses: Sequence[float | None], *, weight: float = 1.0) -> Run:
    """A run folder whose history holds these losses, one for each step."""
    (folder / "model").mkdir(parents=True)
    rows = [{"step": step, "train/loss": loss} for step, loss in enumerate(losses, start=1)]
    lines = [json.dumps(row) + "\n" for row in [*rows, {"step": len(rows), "validation/cider": 0.1}]]
    (folder / "history.jsonl").write_text("".join(lines))
    save_file({"w": np.full(3, weight, np.float32)}, folder / "model/model.safetensors")
    return Run(folder=folder)


def give(bench: Bench, **results: Any) -> None:
    """Results that rows find made already."""
    bench._results |= {name.replace("_", " "): (Lock(), [result]) for name, result in results.items()}


# ---- real commands ----------------------------------------------------------------------------------------


def run_benchmark(*flags: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "benchmarks/gpu.py", "--device", "cpu", *flags]
    return warm.run(command, capture_output=True, text=True, nested=True)


@pytest.mark.timeout(900)
def test_rows_of_real_commands_pass_on_the_cpu(tmp_path: Path) -> None:
    names = ["pack", "SIGTERM and --resume", "captions in float32"]
    done = run_benchmark("--json", tmp_path / "gpu.json", "--only", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [(row["name"], row["result"]) for row in content["rows"]] == [(name, "pass") for name in names]
    assert all(set(bar) == {"name", "value", "bar", "holds"} and bar["holds"] for bar in content["bars"])
    resumed = content["rows"][1]
    assert resumed["figure"] == 0  # on the CPU bit for bit
    assert "stopped after" in resumed["note"]
    assert "weights differ by 0.0e+00" in resumed["note"]


def test_a_row_that_is_not_there_is_refused_with_those_that_are() -> None:
    done = run_benchmark("--only", "fp64")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --only 'fp64'")
    assert '"bf16"' in done.stderr


# ---- jobs -------------------------------------------------------------------------------------------------


def test_a_command_that_fails_makes_its_row_fail_and_shows_its_last_lines(bench: Bench) -> None:
    code = "import sys; print(*range(99), sep='\\n'); sys.exit('no such kernel')"
    found = find(lambda job: Outcome(figure=len(job.run(python(code))), bar=0), bench)
    assert (found.result, found.reason[:11]) == ("FAIL", "exit code 1")
    assert "no such kernel" in found.output
    assert "98" in found.output
    assert "\n7\n" not in found.output


def test_a_command_that_hangs_is_killed_with_all_that_it_started(bench: Bench, tmp_path: Path) -> None:
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'alive')!r}).touch(); time.sleep(60)"
    code = f"import subprocess, sys; print('waiting', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    started = time.monotonic()
    found = find(lambda job: Outcome(figure=len(job.run(python(code))), bar=0), bench, seconds=1)
    assert time.monotonic() - started < 10
    assert (found.result, found.output) == ("FAIL", "waiting")
    assert found.reason.startswith("killed when its time was over")
    time.sleep(2)
    assert not (tmp_path / "alive").exists()


def test_of_several_commands_the_one_that_fails_is_told_at_once(bench: Bench) -> None:
    job = Job(bench, seconds=30)
    ranks = [job.start(python(code)) for code in (HANGS, "raise SystemExit('rank 1 died')")]
    started = time.monotonic()
    with pytest.raises(CheckError) as caught:
        wait_for_all(ranks)
    assert time.monotonic() - started < 10
    assert (caught.value.reason[:11], caught.value.output) == ("exit code 1", "rank 1 died")
    assert ranks[0].process.poll() is not None
    assert wait_for_all([job.start(python(f"print({rank})")) for rank in range(2)]) == "0\n"


def test_when_the_time_for_all_is_over_commands_are_killed_and_other_rows_skipped(bench: Bench, tmp_path: Path) -> None:
    bench.ends = time.monotonic() + 1
    table = Table(json=tmp_path / "gpu.json", width=5)
    rows = [Row(name=name, check=lambda job: Outcome(figure=len(job.run(python(HANGS))), bar=0)) for name in "abc"]
    run_rows(rows, bench, table, parallel=2)
    assert time.monotonic() < bench.ends + 5
    assert table.close() == 1
    rows_found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert sorted(row["result"] for row in rows_found) == ["fail", "fail", "skipped"]
    reasons = sorted(row["reason"] for row in rows_found)
    assert all(reason.startswith("killed when its time was over") for reason in reasons[:2])
    assert reasons[2] == "the time for all rows was over before"


def test_commands_see_the_checkout_and_no_launcher(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"RANK": "3", "ACCELERATE_MIXED_PRECISION": "fp16", "PYTHONPATH": "/mine"}.items():
        monkeypatch.setenv(name, value)
    bench.packages = Path("/wheels")
    found = bench.environment("cpu")
    assert found["PYTHONPATH"] == f"{REPOSITORY}:{REPOSITORY}/benchmarks:/wheels:/mine"
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"RANK", "ACCELERATE_MIXED_PRECISION"} & set(found)
    assert "CUDA_VISIBLE_DEVICES" not in bench.environment("cuda")


def test_what_several_rows_need_is_made_once_and_fails_once(bench: Bench) -> None:
    made: list[int] = []

    def make(_job: Job) -> int:
        made.append(1)
        time.sleep(0.3)
        raise CheckError("no such kernel")

    def check(job: Job) -> Outcome:
        return Outcome(figure=job.shared("a run", make), bar=0)

    table = Table(json=None, width=5)
    run_rows([Row(name=str(number), check=check, seconds=0.1) for number in range(4)], bench, table, parallel=4)
    assert len(made) == 1
    assert sorted(finding.result for finding in table.findings) == ["FAIL", "skipped", "skipped", "skipped"]
    assert {finding.reason for finding in table.findings if finding.result == "skipped"} == {
        "depends on a failed step: a run"
    }


def test_rows_that_want_to_be_alone_are(bench: Bench) -> None:
    running: list[str] = []
    most: dict[str, int] = {}

    def check(name: str) -> Callable[[Job], Outcome]:
        def run(_job: Job) -> Outcome:
            running.append(name)
            time.sleep(0.2)
            most[name] = len(running)
            running.remove(name)
            return Outcome(figure=1, bar=1)

        return run

    rows = [Row(name=name, check=check(name), alone=name.isupper()) for name in "aBcdE"]
    run_rows(rows, bench, table := Table(json=None, width=1), parallel=2)
    assert {name: most[name] for name in "BE"} == {"B": 1, "E": 1}
    assert max(most.values()) == 2
    assert len(table.findings) == 5


# ---- judging ----------------------------------------------------------------------------------------------


def test_a_row_passes_where_its_figure_reaches_its_bar_and_others_go_on(bench: Bench, tmp_path: Path) -> None:
    def broken(_job: Job) -> Outcome:
        raise KeyError("images_a_second")

    outcomes = [
        Outcome(figure=0.9, bar=0.9),
        Outcome(figure=0.89, bar=0.9),
        Outcome(figure=0.04, bar=0.03, at_most=True),
        Outcome(figure=math.nan, bar=0.03, at_most=True),
    ]
    rows = [Row(name=str(n), check=lambda _job, found=found: found) for n, found in enumerate(outcomes)]
    table = Table(json=tmp_path / "gpu.json", width=9)
    run_rows([*rows[1:], Row(name="broken", check=broken), rows[0]], bench, table, parallel=1)
    assert [finding.result for finding in table.findings] == ["FAIL", "FAIL", "FAIL", "FAIL", "pass"]
    assert "KeyError" in table.findings[3].output
    assert table.close() == 1
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["bars"][0] == {"name": "1: at least", "value": 0.89, "bar": 0.9, "holds": False}
    assert content["bars"][-1]["holds"]


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        (LOSSES, ""),
        ([*LOSSES[:3], 3.1, *LOSSES[4:]], "figure"),
        (LOSSES[:-1], "7 steps, not 8"),
        ([*LOSSES[:-1], None], "not finite"),
        ([4.0] * 8, "does not go down"),
    ],
)
def test_other_losses_than_the_cpus_make_a_row_fail(
    losses: list[float | None], reason: str, bench: Bench, tmp_path: Path
) -> None:
    give(bench, fp32=write_run(tmp_path / "a", losses), fp32_on_the_CPU=write_run(tmp_path / "b", LOSSES))
    found = find(fp32, bench)
    assert found.result == ("FAIL" if reason else "pass")
    if reason == "figure":
        assert found.outcome
        assert found.outcome.figure == pytest.approx(0.1 / 3)
    else:
        assert reason in found.reason


def test_a_step_that_is_missing_or_repeated_is_found(tmp_path: Path) -> None:
    run = write_run(tmp_path, LOSSES)
    path = tmp_path / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for wrong in (lines[:2] + lines[3:], [*lines[:3], *lines[2:]]):
        path.write_text("".join(wrong))
        with pytest.raises(CheckError, match="not each once"):
            run.losses()


def test_half_precision_that_ends_elsewhere_fails(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(bench, fp32=write_run(tmp_path / "a", LOSSES))
    runs = iter([write_run(tmp_path / "b", [4.1, *LOSSES[1:]]), write_run(tmp_path / "c", [*LOSSES[:-2], 3.0, 3.0])])
    monkeypatch.setattr(training, "train", lambda *_, **__: next(runs))
    for result in ("pass", "FAIL"):
        assert find(lambda job: half_precision(job, precision="bf16", tolerance=0.05), bench).result == result
    with pytest.raises(SkipError):
        half_precision(Job(bench, seconds=1), precision="fp16", tolerance=0.05)


def test_other_weights_are_found(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "a", LOSSES), write_run(tmp_path / "b", LOSSES, weight=1.5)
    assert weight_difference(one, one) == 0
    assert weight_difference(two, one) == 0.5


def test_other_captions_than_the_cpus_make_a_row_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {f"{number}.jpg": f"a {number}" for number in range(20)}
    give(bench, captions_on_the_CPU=wanted)
    for changed, result in ((1, "pass"), (2, "FAIL")):
        found = wanted | {f"{number}.jpg": "a dog" for number in range(changed)}
        monkeypatch.setattr(model, "captions", lambda *_, found=found, **__: found)
        assert find(lambda job: same_captions(job, precision="float32", least=0.95), bench).result == result


def test_a_loop_that_is_slow_or_waits_makes_rows_fail(bench: Bench) -> None:
    bench.small = False
    found = {"images_a_second": 900.0, "captions_a_second": 4500.0, "parts_images_a_second": 1000.0,
             "peak_gigabytes": 3.0, "new_pinned_blocks": 0}  # fmt: skip
    for ratio, waiting_share, result in ((0.9, 0.03, "pass"), (0.89, 0.031, "FAIL")):
        bench._results.clear()
        give(bench, **{"speed, bf16, 128": found | {"ratio": ratio, "waiting_share": waiting_share}})
        for check in (loop_speed, waiting):
            assert find(partial(check, batch=128, precision="bf16"), bench).result == result


def test_training_on_another_device_than_asked_for_is_found() -> None:
    printed = "640 training images, 90 words, 1 epochs of 20 steps on 1 x cpu, 0 of them done"
    check_trained_on("cpu", printed)
    for device, processes in (("cuda", 1), ("cpu", 2)):
        with pytest.raises(CheckError, match="did not train"):
            check_trained_on(device, printed, processes=processes)


def test_pictures_without_captions_are_a_failure(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "import sys, pathlib; pathlib.Path(sys.argv[sys.argv.index('--output') + 1]).write_text('{}\\n')"
    (tmp_path / "caption.py").write_text(code)
    monkeypatch.setattr(commands, "CAPTION", tmp_path / "caption.py")
    give(bench, fp32=Run(folder=tmp_path), data=commands.Data(scenes=tmp_path, shards=tmp_path))
    with pytest.raises(CheckError, match="0 of 12 pictures have a caption"):
        commands.captions(Job(bench, seconds=20), precision="float32")


def test_the_last_of_a_flags_values_counts() -> None:
    flags = ["--epochs", 1, "--cache-features", "--weights", "none", "--epochs", 20, "--weights", None]
    assert last_flags(flags) == ["--epochs", 20, "--cache-features"]


# ---- wheels -----------------------------------------------------------------------------------------------


def write_wheel(
    folder: Path, name: str, version: str, *, needs: Sequence[str] = (), tags: str = "py3-none-any"
) -> Path:
    """A wheel of one module that says what it is."""
    path = folder / f"{name}-{version}-{tags}.whl"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tags}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def requirements(*texts: str) -> list[Requirement]:
    return [Requirement(text) for text in texts]


def test_wheels_bring_what_is_missing_and_what_that_needs_but_never_torch(tmp_path: Path) -> None:
    reader = write_wheel(tmp_path, "reader_kept", "1.2", needs=["braces_kept", 'other; extra == "all"', "numpy"])
    old = write_wheel(tmp_path, "reader_kept", "1.1")
    braces = write_wheel(tmp_path, "braces_kept", "0.1")
    elsewhere = write_wheel(tmp_path, "tools_kept", "1.0", tags="cp312-cp312-win_amd64")
    torch = write_wheel(tmp_path, "torch", "99.0")
    numpy = write_wheel(tmp_path, "numpy", "99.0")
    wheels = [reader, old, braces, elsewhere, torch, numpy]
    wanted = requirements("reader-kept>=1.0", "tools-kept", "torch>=50", "numpy>=2.0")
    found = packages.find_needs(wanted, wheels)
    assert set(found.wheels) == {reader, braces}
    assert sorted(map(str, found.missing)) == ["tools-kept", "torch>=50"]


def test_the_projects_own_requirements_are_met_here() -> None:
    assert packages.find_needs(packages.required_packages(), []) == packages.Needs(wheels=(), brought=(), missing=())


def test_commands_import_unpacked_wheels(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "reader_kept", "1.2")
    monkeypatch.setattr(packages, "required_packages", lambda: requirements("reader-kept", "numpy"))
    bench.packages = gpu.prepare_packages(wheels, tmp_path / "unpacked")
    assert Job(bench, seconds=20).run(python("import reader_kept; print(reader_kept.VERSION)")) == "1.2\n"


def test_what_no_wheel_brings_ends_the_benchmark_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(tmp_path, "reader_kept", "1.2")
    monkeypatch.setattr(packages, "required_packages", lambda: requirements("reader-kept", "tools-kept>=2"))
    with pytest.raises(SystemExit) as caught:
        gpu.prepare_packages(tmp_path, tmp_path / "unpacked")
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "missing: reader-kept; taken from reader_kept-1.2-py3-none-any.whl\n"
    assert printed.err.startswith("error: missing, and not in --wheels")
    assert "tools-kept>=2" in printed.err
    assert not (tmp_path / "unpacked").exists()
