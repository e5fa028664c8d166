"""Checkpoints and resumed runs, whatever happens to the process, the disk or the files (faults A of the study)."""

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from t2i.training.common.checkpoint import find_newest_checkpoint, load_checkpoint, save_checkpoint, verify_checkpoint

from t2i.errors import RESUMABLE_STATUS, InputError, RunError, RunStopped
from t2i.runtime.processes import SIGNAL_REPEAT_SECONDS
from tests.faults import tiny_run
from tests.faults.record import fault, record
from tests.helpers.processes.forked import ForkedProgram

SCRIPT = Path(tiny_run.__file__)
CALLS = ("fsync", "rename", "mkdir", "unlink", "rmdir", "open")  # of os: what changes the disk, and shutil's way to it
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def start(folder: Path, *arguments: str, processes: int = 1, **more: str) -> ForkedProgram:
    """A tiny run in processes of its own, without a launcher."""
    command = [SCRIPT, folder, *arguments]
    return ForkedProgram(command, processes, {**os.environ, "OMP_NUM_THREADS": "1", **more}, merged=True)


def launch(
    folder: Path,
    *arguments: str,
    processes: int = 1,
    restarts: int = 0,
    limit: Callable[[], None] | None = None,
    **more: str,
) -> subprocess.Popen:
    """A tiny run as a user starts it, several processes by torchrun."""
    command = [sys.executable, str(SCRIPT), str(folder), *arguments]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher.append(f"--max-restarts={restarts}")
        command = [sys.executable, *launcher, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **more}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=limit
    )


def finish(process: subprocess.Popen | ForkedProgram, seconds: float = 120) -> tuple[int, str]:
    """Exit status and output."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def contents(folder: Path, step: int = 12) -> dict[str, str]:
    """What a run ends with: a hash of its weights, averages and optimizer."""
    path = folder / "checkpoints" / f"step-{step:08}"
    return {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in FILES[:3]}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | ForkedProgram, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("unbroken")
    tiny_run.run(folder)
    return contents(folder)


def save(folder: Path, step: int, keep: int) -> None:
    """A checkpoint whose every number tells its step; the files grow, so that a limit of size picks one."""
    groups = {name: torch.full((64 * 4**i,), float(step)) for i, name in enumerate(("model", "ema", "optimizer"))}
    save_checkpoint(folder, step, {name: {"x": group} for name, group in groups.items()}, {"note": step}, keep)


def in_child(action: Callable[[], None]) -> bool:
    """Whether a forked child that does this dies of it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(99)  # a mistake of the test
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status != 99
    return status != 0


def check_one_or_the_other(folder: Path, keep: int) -> bool:
    path, _ = find_newest_checkpoint(folder)
    assert path is not None
    checkpoint = load_checkpoint(path)
    step = checkpoint.state["step"]
    whole = step in (2, 3) and checkpoint.state["note"] == step
    whole &= all(bool((group["x"] == step).all()) for group in checkpoint.tensors.values())
    save(folder, 4, keep)  # what the dead left is in nobody's way
    names = sorted(path.name for path in folder.iterdir())
    return (
        whole and names[-1] == "step-00000004" and len(names) <= keep and verify_checkpoint(folder / names[-1]) is None
    )


def die_at_call(number: int) -> None:
    """In a child: end without any clean-up at the n-th call that changes the disk."""
    count = 0
    for name in CALLS:
        real = getattr(os, name)

        def counted(*arguments, real=real, **options):
            nonlocal count
            count += 1
            if count == number:
                os._exit(137)
            return real(*arguments, **options)

        setattr(os, name, counted)


def die_in_text(expected: str, size: int) -> None:
    """In a child: end after the first bytes of one of the JSON files."""

    def write(path: Path, text: str, real=Path.write_text, **options) -> int:
        if path.name != expected:
            return real(path, text, **options)
        real(path, text[:size], **options)
        os._exit(137)

    Path.write_text = write


def die_at_byte(size: int) -> None:
    """In a child: the kernel ends it when it writes byte `size` of any file, in Python or in Rust."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def deaths(folder: Path) -> list[Callable[[], None]]:
    """Every way to die in a save."""
    save(folder / "measured", 1, 1)
    sizes = {name: (folder / "measured/step-00000001" / name).stat().st_size for name in FILES}
    ways: list[Callable[[], None]] = [lambda n=n: die_at_call(n) for n in range(1, 60)]
    smaller = 0
    for name in FILES[:3]:
        header = sizes[name] - 4 * 64 * 4 ** FILES.index(name)
        at = {0, 1, 7, 8, header - 1, header, header + 1, sizes[name] - 1, *range(0, sizes[name], sizes[name] // 8)}
        ways += [lambda n=n: die_at_byte(n) for n in sorted(at) if n >= smaller]
        smaller = sizes[name]
    for name in FILES[3:]:
        at = {0, 1, sizes[name] - 1, *range(0, sizes[name], sizes[name] // 5)}
        ways += [lambda name=name, n=n: die_in_text(name, n) for n in sorted(at)]
    return ways


def kill_saves(folder: Path, chosen: slice) -> tuple[int, int]:
    killed = survived = 0
    for keep in (1, 2):
        for i, way in enumerate(deaths(folder / f"{keep}")[chosen]):
            place = folder / f"{keep}-{i}"
            save(place, 2, keep)

            def action(way=way, place=place, keep=keep) -> None:
                way()
                save(place, 3, keep)

            if in_child(action):
                killed += 1
                survived += check_one_or_the_other(place, keep)
            shutil.rmtree(place)
    return killed, survived


def test_a_save_that_is_killed_leaves_the_new_or_the_previous_checkpoint(tmp_path):
    killed, survived = kill_saves(tmp_path, slice(0, None, 4))
    assert killed >= 20
    record("A1 a save is killed (some places)", killed, survived)


@pytest.mark.faults
def test_a_save_that_is_killed_anywhere_leaves_the_new_or_the_previous_checkpoint(tmp_path):
    killed, survived = kill_saves(tmp_path, slice(0, None))
    assert killed >= 100
    record("A1 A2 a save is killed at every call and at bytes of every file", killed, survived)


@pytest.mark.faults
def test_a_save_that_is_killed_at_every_system_call_leaves_a_whole_checkpoint(tmp_path):
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parents[2])!r})\n"
        "from pathlib import Path\nfrom tests.faults.test_checkpoint_faults import save\n"
        "save(Path(sys.argv[1]), int(sys.argv[2]), 1)\n"
    )
    killed = survived = 0
    for call, numbers in {"fsync": range(1, 8), "rename": range(1, 3), "unlink,unlinkat": range(1, 4)}.items():
        for number in numbers:
            folder = tmp_path / f"{call}-{number}"
            save(folder, 2, 1)
            inject = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when={number}"]
            run = [*inject, "-e", f"trace={call}", sys.executable, "-c", code, str(folder), "3"]
            if subprocess.run(run, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode:
                killed += 1
                survived += check_one_or_the_other(folder, 1)
    record("A1 a save is killed at a system call", killed, survived)


def test_every_file_is_on_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    order: list[tuple[str, str]] = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)

        def noted(*arguments, real=real, name=name):
            path = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[1])
            order.append((name, Path(path).name))
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)
    save(tmp_path / "checkpoints", 3, 1)
    renamed = order.index(("rename", "step-00000003"))
    synced = {name for call, name in order[:renamed] if call == "fsync"}
    assert synced == {*FILES, "step-00000003.unfinished"}
    assert order[renamed + 1] == ("fsync", "checkpoints")


def test_300_flipped_bits_are_detected_and_the_file_is_named(tmp_path):
    save(tmp_path, 1, 2)
    save(tmp_path, 2, 2)
    rng, folder, found = random.Random(0), tmp_path / "step-00000002", 0
    paths = [folder / name for name in FILES]
    for i in range(300):
        path = paths[i % len(paths)]
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        before = path.read_bytes()
        path.write_bytes(content)
        newest, problems = find_newest_checkpoint(tmp_path)
        named = path.name in problems[0] if problems and path.name != "manifest.json" else bool(problems)
        found += newest == tmp_path / "step-00000001" and named
        path.write_bytes(before)
    record("A6 a bit of a checkpoint is flipped", 300, found)


def test_a_file_that_is_cut_missing_or_garbage_is_named_and_the_previous_checkpoint_loads(tmp_path):
    injected = survived = 0
    for name in FILES:
        for damage in ("missing", "empty", "header", "half", "last", "garbage", "of another step"):
            folder = tmp_path / f"{name}-{damage}"
            save(folder, 1, 2)
            save(folder, 2, 2)
            path = folder / "step-00000002" / name
            content = path.read_bytes()
            match damage:
                case "missing":
                    path.unlink()
                case "garbage":
                    path.write_bytes(b"[" * 100_000)
                case "of another step":
                    path.write_bytes((folder / "step-00000001" / name).read_bytes())
                case _:
                    end = {"empty": 0, "header": 8, "half": len(content) // 2, "last": -1}[damage]
                    path.write_bytes(content[:end])
            newest, problems = find_newest_checkpoint(folder)
            injected += 1
            survived += newest is not None and newest.name == "step-00000001" and "step-00000002" in problems[0]
    record("A5 A7 a file of a checkpoint is cut, missing or garbage", injected, survived)


@fault("A7 a manifest that names files elsewhere", 3)
def test_a_manifest_that_points_elsewhere_is_refused(tmp_path):
    save(tmp_path, 1, 1)
    secret = tmp_path / "secret"
    secret.write_text("x")
    manifest = tmp_path / "step-00000001/manifest.json"
    for name in ("../secret", str(secret), "..\\secret"):
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), name: hashlib.sha256(b"x").hexdigest()}))
        assert "not a file beside it" in verify_checkpoint(manifest.parent) or "whole checkpoint" in verify_checkpoint(
            manifest.parent
        )


@fault("A5 a damaged newest checkpoint")
def test_a_run_that_is_damaged_goes_on_from_the_previous_checkpoint_but_not_if_it_was_asked_for(
    tmp_path, unbroken, capsys
):
    tiny_run.run(tmp_path, "steps=6")
    newest = tmp_path / "checkpoints/step-00000006/ema.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"train.resume is .*step-00000006.*SHA-256"):
        tiny_run.run(tmp_path, "resume=step-00000006")
    tiny_run.run(tmp_path)
    assert "skipped: " in (out := capsys.readouterr().out) and "step-00000006/ema.safetensors" in out
    assert contents(tmp_path) == unbroken


@fault("A5 no whole checkpoint")
def test_a_run_without_a_whole_checkpoint_does_not_start_anew_in_silence(tmp_path):
    tiny_run.run(tmp_path, "steps=3")
    (tmp_path / "checkpoints/step-00000003/model.safetensors").unlink()
    with pytest.raises(RunError, match="all checkpoints in .* are damaged"):
        tiny_run.run(tmp_path)


@fault("A9 A10 a checkpoint of another model, of a newer version", 2)
def test_a_checkpoint_of_another_model_or_a_newer_version_is_refused_with_names(tmp_path, monkeypatch):
    tiny_run.run(tmp_path, "steps=3")
    with monkeypatch.context() as patch:
        patch.setattr(tiny_run.Layers, "__init__", wider)
        with pytest.raises(InputError, match=r"another model.*0\.weight \(32, 8\) instead of \(16, 8\)"):
            tiny_run.run(tmp_path)
    folder = tmp_path / "checkpoints/step-00000003"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": 99, "version": "9.0"}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"written by t2i 9\.0, this is"):
        tiny_run.run(tmp_path)


def wider(self: tiny_run.Layers, scaled: bool = True) -> None:
    torch.nn.Module.__init__(self)
    self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    self.scale = torch.nn.Parameter(torch.ones(()))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
@fault("A11 stopped in a pass and an accumulation, bit for bit")
def test_a_stopped_run_ends_bit_for_bit_like_the_unbroken_one(tmp_path, workers, accumulation):
    """SIGTERM in the middle of a pass and of an accumulation; and a control that differs, so that this can fail."""
    settings = [f"gradient_accumulation={accumulation}", f"workers={workers}"]
    tiny_run.run(tmp_path / "unbroken", *settings[:1])
    with pytest.raises(RunStopped) as stopped:  # in step 5
        tiny_run.run(tmp_path / "broken", *settings, f"signal:0:{accumulation * 4 + (accumulation + 1) // 2}")
    assert stopped.value.status == RESUMABLE_STATUS and not multiprocessing.active_children()
    path, problems = find_newest_checkpoint(tmp_path / "broken/checkpoints")
    assert path.name == "step-00000005" and not problems
    tiny_run.run(tmp_path / "broken", *settings)
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")
    tiny_run.run(tmp_path / "other", *settings, "seed=1")
    assert contents(tmp_path / "other") != contents(tmp_path / "unbroken")


@pytest.mark.faults
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_killed_by_force_ends_bit_for_bit_like_the_unbroken_one(tmp_path, processes, workers, accumulation):
    settings = [f"gradient_accumulation={accumulation}", f"workers={workers}", "steps=30"]
    assert finish(launch(tmp_path / "unbroken", *settings, processes=processes))[0] == 0
    survived = 0
    for step in (2, 7, 11):
        folder = tmp_path / f"broken-{step}"
        fault = f"die:{processes - 1}:{step * accumulation}"
        assert finish(launch(folder, *settings, fault, processes=processes))[0] != 0
        status, output = finish(launch(folder, *settings, processes=processes))
        assert status == 0, output
        survived += contents(folder, 30) == contents(tmp_path / "unbroken", 30)
    kind = f"{processes} processes, {workers} workers, {accumulation} micro-batches"
    record(f"A11 killed and resumed bit for bit: {kind}", 3, survived)


@fault("A12 1 process, 2, and 1 again", 2)
def test_the_number_of_processes_may_change_if_a_step_keeps_its_samples(tmp_path):
    """Two processes with 3 samples each, then one with 6: the same samples a step; else it is refused."""
    tiny_run.run(tmp_path, "steps=3", "batch_size=6")
    status, output = finish(start(tmp_path, "steps=6", processes=2))
    assert status == 0 and "resuming from" in output, output
    tiny_run.run(tmp_path, "steps=9", "gradient_accumulation=2")
    with pytest.raises(InputError, match=r"6 samples a step .* now 3 x 1 x 1 = 3"):
        tiny_run.run(tmp_path)


@fault("A14 a second trainer in the same folder")
def test_a_second_trainer_in_the_same_folder_is_refused(tmp_path):
    first = start(tmp_path, "sleep:0:1")
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists(), first)
    status, output = finish(start(tmp_path))
    first.kill()
    first.communicate()
    assert status == 2 and f"locked by process {first.pid} on" in output
    assert finish(start(tmp_path, "steps=3"))[0] == 0  # the lock went with the process


@fault("A15 a second signal")
def test_a_second_signal_ends_at_once_and_a_valid_checkpoint_stays(tmp_path):
    process = start(tmp_path, "sleep:0:1")
    wait_for(lambda: (tmp_path / "checkpoints/step-00000006").exists(), process)
    time.sleep(1)  # it sleeps in reading the data of step 7
    process.send_signal(signal.SIGTERM)
    time.sleep(SIGNAL_REPEAT_SECONDS + 0.5)  # sooner, it may be the same one, passed on by a launcher
    process.send_signal(signal.SIGTERM)
    assert finish(process, 10)[0] == 128 + signal.SIGTERM
    assert verify_checkpoint(tmp_path / "checkpoints/step-00000006") is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@fault("A15 SIGTERM and Ctrl-C")
def test_a_signal_at_any_time_saves_within_a_step_and_tells_by_the_status(tmp_path, number, unbroken):
    process = start(tmp_path, "workers=2")
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists(), process)
    process.send_signal(number)
    done = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    status, output = finish(process)
    if status == 0:
        pytest.skip("the run was over before the signal came")
    assert status == (75 if number == signal.SIGTERM else 130) and "Traceback" not in output, output
    path, _ = find_newest_checkpoint(tmp_path / "checkpoints")
    assert int(path.name.removeprefix("step-")) <= done + 2
    tiny_run.run(tmp_path)
    assert contents(tmp_path) == unbroken


@fault("A3 the disk is full during a save", 3)
def test_a_full_disk_keeps_the_older_checkpoint_and_ends_the_run_after_three_tries(tmp_path):
    assert finish(start(tmp_path, "steps=3"))[0] == 0

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # Python ignores the signal: writing fails instead

    status, output = finish(launch(tmp_path, limit=limit, PYTHONDONTWRITEBYTECODE="1"))
    assert status == 1 and output.count("could not be saved") == 3, output
    assert "step-00000003 is kept" in output and "Traceback" not in output
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert verify_checkpoint(tmp_path / "checkpoints/step-00000003") is None
    status, output = finish(start(tmp_path))
    assert status == 0 and "resuming from" in output


@pytest.mark.faults
@fault("A3 a file system without space")
def test_a_file_system_without_space_keeps_the_older_checkpoint(tmp_path):
    mount = f"mount -t tmpfs -o size=60k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs user namespaces")
    script = f"{sys.executable} {SCRIPT} {tmp_path}"
    fill = f"head -c 20000 /dev/zero > {tmp_path}/fill"
    both = f"{mount} && {script} steps=3 keep=1 && {fill}; {script} keep=1; echo status $?; ls {tmp_path}/checkpoints"
    result = subprocess.run(["unshare", "-rm", "sh", "-c", both], capture_output=True, text=True)
    assert "step-00000003" in result.stdout, result.stdout + result.stderr
    assert "status 2" in result.stdout and "too little disk" in result.stderr


@fault("A3 too little disk, before the first step")
def test_too_little_disk_is_said_before_the_first_step_with_the_numbers(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"too little disk .* checkpoints of 0\.0 MB .* free"):
        tiny_run.run(tmp_path)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("folder", ["/proc/t2i", "/dev/null/run"])
@fault("A4 an output that cannot be written")
def test_an_output_that_cannot_be_written_is_refused_before_the_first_step(folder):
    with pytest.raises(InputError, match="cannot be written|which is a file"):
        tiny_run.run(Path(folder))


@fault("A16 a finished run")
def test_a_finished_run_says_so(tmp_path, capsys):
    tiny_run.run(tmp_path)
    before = contents(tmp_path)
    tiny_run.run(tmp_path)
    assert "already trained for 12 steps" in capsys.readouterr().out
    assert contents(tmp_path) == before


@fault("A17 the average comes back")
def test_an_average_is_not_the_weights_and_comes_back(tmp_path, unbroken):
    tiny_run.run(tmp_path, "steps=6")
    checkpoint = load_checkpoint(find_newest_checkpoint(tmp_path / "checkpoints")[0])
    weights, average = checkpoint.tensors["model"], checkpoint.tensors["ema"]
    assert all(not torch.equal(weights[name], average[name]) for name in average)
    tiny_run.run(tmp_path)
    assert contents(tmp_path) == unbroken


@fault("A13 a leftover of the same step")
def test_a_leftover_of_the_same_step_is_overwritten(tmp_path, unbroken):
    tiny_run.run(tmp_path, "steps=3")
    leftover = tmp_path / "checkpoints/step-00000006.unfinished"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    tiny_run.run(tmp_path)
    assert contents(tmp_path) == unbroken and not leftover.exists()


@fault("A19 an old checkpoint that cannot be deleted")
def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, capsys):
    real = shutil.rmtree

    def busy(path, *rest, **more):
        if Path(path).name == "step-00000003":
            raise OSError(16, "Device or resource busy")
        return real(path, *rest, **more)

    monkeypatch.setattr(shutil, "rmtree", busy)
    tiny_run.run(tmp_path, "keep=1")
    assert "step-00000003 cannot be deleted" in capsys.readouterr().out
    assert (tmp_path / "checkpoints/step-00000012").exists()


@fault("A18 a umask of 022")
def test_checkpoints_are_readable_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        save(tmp_path, 1, 1)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "step-00000001").iterdir()} == {0o644}
    assert load_file(tmp_path / "step-00000001/ema.safetensors")["x"][0] == 1
