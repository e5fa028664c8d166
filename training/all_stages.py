"""From data to a pipeline: what `t2i init` wrote, stage after stage, each in its own process.

A stage is done if nothing has changed since: its configuration, the manifest, what the stages before it left, and what
it left itself. Any other is given to its script, which goes on where it stopped, or says why it cannot.
"""

import hashlib
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

from t2i.pipelines.jobs.assemble import assemble_pipeline

from t2i.config import load_config
from t2i.data.cache import read_json
from t2i.data.freshness import find_changes
from t2i.data.manifest import find_manifest, open_manifest
from t2i.data.report import sanitize_text
from t2i.errors import RESUMABLE_STATUS, InputError, RunError
from t2i.files.atomic import compute_file_sha256, create_folder_atomically, write_json_file
from t2i.files.model_folder import read_model_class
from t2i.runtime.launch import build_torchrun_command

STAGE_SCRIPTS = {
    "clip": "train_clip",
    "autoencoder": "train_autoencoder",
    "cache": "cache_data",
    "prior": "train_prior",
    "decoder": "train_decoder",
}
OPTIONAL_STAGES = ("clip", "autoencoder")  # where a public one is named
DONE_FILE = "done.json"  # by stage: what it was made from and what it left, as hashes
PIPELINE_NAME = "pipeline"
HANGUP_SIGNAL = getattr(signal, "SIGHUP", None)  # a closed terminal; Windows has none
STOP_SIGNALS = [number for number in (signal.SIGTERM, signal.SIGINT, HANGUP_SIGNAL) if number is not None]


@dataclass(frozen=True)
class RunStage:
    """A stage of a run."""

    name: str
    script: Path
    file: Path  # its configuration, ...
    config: Any  # ... read
    output: Path

    @property
    def task_description(self) -> str:
        if self.name == "cache":
            return f"encodes every picture and caption into {self.output}"
        return f"{self.config.train.steps:,} steps into {self.output}"

    def find_result_files(self) -> list[Path]:
        """The files that later stages read."""
        if self.name == "cache":
            return [self.output / "cache.json"]  # it holds the hashes of the others
        return [path for part in ("model", "scheduler", "text_encoder") for path in find_files(self.output / part)]


@dataclass(frozen=True)
class Run:
    folder: Path
    steps: list[RunStage]

    @classmethod
    def read_folder(cls, folder: Path) -> "Run":
        """The configurations in a folder, all of them before anything starts. Raises InputError."""
        needed = [name for name in STAGE_SCRIPTS if name not in OPTIONAL_STAGES]
        if missing := [f"{name}.yaml" for name in needed if not (folder / f"{name}.yaml").is_file()]:
            raise InputError(
                f"{str(folder)!r} has no {', '.join(missing)}; `t2i init {folder} --data PICTURES` writes them"
            )
        run = cls(folder, [read_stage(folder, name) for name in STAGE_SCRIPTS if (folder / f"{name}.yaml").is_file()])
        run.check_stage_models()
        run.check_data_manifest()
        if run.pipeline_folder.exists() and not (run.pipeline_folder / "model_index.json").is_file():
            raise InputError(f"{str(run.pipeline_folder)!r} is no pipeline and is not replaced; move it elsewhere")
        return run

    @property
    def pipeline_folder(self) -> Path:
        return self.folder / PIPELINE_NAME

    def __getitem__(self, name: str) -> Any:
        """The configuration of a stage."""
        return next(step.config for step in self.steps if step.name == name)

    def check_stage_models(self) -> None:
        """Refuse a stage that takes over a model which no stage here will make."""
        names = [step.name for step in self.steps]
        for step in self.steps:
            for model in OPTIONAL_STAGES:
                wanted = getattr(step.config, model, None)
                here = wanted is not None and Path(wanted).resolve() == (self.folder / model).resolve()
                if here and model not in names and read_model_class(self.folder / model / "model") is None:
                    raise InputError(f"{step.file} wants {wanted!r}, but {str(self.folder)!r} has no {model}.yaml")

    def check_data_manifest(self) -> None:
        """Refuse data without a manifest; and, before anything is trained, with one that is out of date."""
        for path in sorted({step.config.data.path for step in self.steps}):
            open_manifest(path)
            if found := find_changes(path):
                what = f"{path!r} is not what was checked: {found}"
                if not any(step.output.exists() for step in self.steps):
                    raise InputError(f"{what}; `t2i data check {path}` reads it again")
                print(f"warning: {what}; training goes on with what was checked", flush=True)

    def hash_inputs(self, step: RunStage | None) -> str:
        """A hash of all that a stage depends on; None is the pipeline."""
        before = self.steps[: self.steps.index(step)] if step else self.steps
        files = [path for one in before for path in one.find_result_files()]
        if step:
            files += [step.file, find_manifest(Path(step.config.data.path))]
        return hash_files(files)

    def read_example_caption(self) -> str:
        """A caption of the data."""
        return sanitize_text(next(open_manifest(self["prior"].data.path).iterate_rows("captions"))["captions"][0])


def read_stage(folder: Path, name: str) -> RunStage:
    script, file = import_module(f"t2i.training.{STAGE_SCRIPTS[name]}"), folder / f"{name}.yaml"
    config = load_config(script.Config, name, [str(file)])
    output = config.output if name == "cache" else config.train.output
    if Path(output).resolve() != (folder / name).resolve():
        where = "run this where `t2i init` was run, or change it"
        raise InputError(f"{file} writes to {output!r}, which is not {str(folder / name)!r} seen from here; {where}")
    return RunStage(name, Path(str(script.__file__)), file, config, folder / name)


def find_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def hash_files(files: list[Path]) -> str:
    """A hash of the names and contents of files, those that are missing included."""
    hasher = hashlib.sha256()
    for path in files:
        hasher.update(f"{path.name} {compute_file_sha256(path) if path.is_file() else 'missing'}\n".encode())
    return hasher.hexdigest()


class Trainer:
    """Starts the stages of a run, passes SIGTERM, SIGHUP and Ctrl-C on to the one that runs, and waits for it."""

    def __init__(self, run: Run, num_processes: int = 1, max_restarts: int = 0):
        self.run, self.num_processes, self.max_restarts = run, num_processes, max_restarts
        self.child: subprocess.Popen | None = None
        self.signal = 0

    def train(self) -> int:
        """All that is not done yet. The exit status: 0, or that of the stage that failed or was stopped."""
        before = {
            number: signal.signal(number, self.forward_signal)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        try:
            return self.train_stages() or self.assemble_pipeline()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def train_stages(self) -> int:
        for step in self.run.steps:
            inputs = self.run.hash_inputs(step)
            if self.is_stage_done(step.name, inputs, step.find_result_files()):
                self.print_stage_status(step.name, f"done, {step.output}")
                continue
            self.print_stage_status(step.name, step.task_description)
            if status := self.run_stage(step):
                return status
            self.record_stage_done(step.name, inputs, step.find_result_files())
        return 0

    def assemble_pipeline(self) -> int:
        """The pipeline folder, replaced whole if a stage has changed."""
        folder, inputs = self.run.pipeline_folder, self.run.hash_inputs(None)
        if self.is_stage_done(PIPELINE_NAME, inputs, find_files(folder)):
            self.print_stage_status(PIPELINE_NAME, f"done, {folder}")
        else:
            self.print_stage_status(PIPELINE_NAME, f"puts the stages together in {folder}")
            decoder = self.run["decoder"]
            pipeline = assemble_pipeline(self.run.folder, clip=decoder.clip, autoencoder=decoder.autoencoder)
            with create_folder_atomically(folder) as unfinished:
                pipeline.save_pretrained(unfinished)
            self.record_stage_done(PIPELINE_NAME, inputs, find_files(folder))
        print(
            f"draw: t2i generate {shlex.quote(self.run.read_example_caption())} --model {shlex.quote(str(folder))}",
            flush=True,
        )
        return 0

    def estimate_costs(self) -> int:
        """What each stage will cost, as far as the stages before it are there; nothing is written."""
        for step in self.run.steps:
            cached = (self.run.folder / "cache" / "cache.json").is_file()
            if step.name == "cache":
                self.print_stage_status(step.name, step.task_description)
            elif step.name in OPTIONAL_STAGES or cached:
                self.print_stage_status(step.name, step.task_description)
                no_prior = step.name == "decoder" and read_model_class(self.run.folder / "prior" / "model") is None
                if status := self.run_stage(step, "train.dry_run=true", *(["sample.prior=null"] if no_prior else [])):
                    return status
            else:
                self.print_stage_status(
                    step.name, f"{step.task_description}; its cost can be told when the cache is there"
                )
        return 0

    def run_stage(self, step: RunStage, *overrides: str) -> int:
        """Run a stage's script to its end; its exit status."""
        script = [str(step.script), str(step.file), *overrides]
        several = self.num_processes > 1
        command = (
            build_torchrun_command(script, self.num_processes, self.max_restarts)
            if several
            else [sys.executable, *script]
        )
        # A process group of its own: Ctrl-C in a terminal reaches it once, from here.
        self.child = subprocess.Popen(command, process_group=0)
        if self.signal:  # it came while the process started
            self.child.send_signal(self.signal)
        status = self.child.wait()
        if self.signal and (status <= 0 or several):  # it had ended; a cache does not catch it; torchrun says 1
            return 128 + signal.SIGINT if self.signal == signal.SIGINT else RESUMABLE_STATUS
        if status < 0:
            name = signal.Signals(-status).name
            raise RunError(f"{step.name} was ended by {name}, by hand or for lack of memory; the same command goes on")
        return status

    def forward_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on; a closed terminal asks to stop as SIGTERM does."""
        self.signal = signal.SIGTERM if number == HANGUP_SIGNAL else number
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(self.signal)

    def is_stage_done(self, name: str, inputs: str, results: list[Path]) -> bool:
        return bool(results) and self.read_done_stages().get(name) == [inputs, hash_files(results)]

    def record_stage_done(self, name: str, inputs: str, results: list[Path]) -> None:
        write_json_file(self.run.folder / DONE_FILE, {**self.read_done_stages(), name: [inputs, hash_files(results)]})

    def read_done_stages(self) -> dict[str, Any]:
        path = self.run.folder / DONE_FILE
        return read_json(path) if path.is_file() else {}

    def print_stage_status(self, name: str, what: str) -> None:
        names = [*(step.name for step in self.run.steps), PIPELINE_NAME]
        print(f"{names.index(name) + 1}/{len(names)} {name}: {what}", flush=True)
