"""From data to a pipeline: train the stages that `t2i init` configured, one after the other, each in a process.

A stage is done if its configuration, the manifest, the results of the stages before it and its own results are
unchanged. Any other stage is run; its script continues from its checkpoint, or refuses with a reason.
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

from t2i.pipelines.jobs.assemble import write_pipeline_folder

from t2i.config import load_config
from t2i.data.freshness import find_changes
from t2i.data.manifest import find_manifest, open_manifest
from t2i.data.report import sanitize_text
from t2i.errors import RESUMABLE_STATUS, InputError, RunError
from t2i.files.atomic import compute_file_sha256, write_json_file
from t2i.files.model_folder import read_model_class
from t2i.files.publishing import CARD_FILE
from t2i.files.untrusted import read_json
from t2i.runtime.launch import build_torchrun_command
from t2i.terminal import print_note

STAGE_SCRIPTS = {
    "clip": "train_clip",
    "autoencoder": "train_autoencoder",
    "cache": "cache_data",
    "prior": "train_prior",
    "decoder": "train_decoder",
}
OPTIONAL_STAGES = ("clip", "autoencoder")  # a trained or public model can take their place
DONE_FILE = "done.json"  # by stage: a hash of its inputs and one of its results
PIPELINE_NAME = "pipeline"
HANGUP_SIGNAL = getattr(signal, "SIGHUP", None)  # a closed terminal; not on Windows
STOP_SIGNALS = [number for number in (signal.SIGTERM, signal.SIGINT, HANGUP_SIGNAL) if number is not None]


@dataclass(frozen=True)
class RunStage:
    """A stage of a run, with its configuration."""

    name: str
    script: Path
    file: Path  # of the configuration
    config: Any
    output: Path

    @property
    def task_description(self) -> str:
        if self.name == "cache":
            return f"encodes every image and caption into {self.output}"
        return f"{self.config.train.steps:,} steps into {self.output}"

    def find_result_files(self) -> list[Path]:
        """Return the files that later stages read."""
        if self.name == "cache":
            return [self.output / "cache.json"]  # which contains the hashes of the other files
        return [path for part in ("model", "scheduler", "text_encoder") for path in find_files(self.output / part)]


@dataclass(frozen=True)
class Run:
    """The folder that `t2i init` wrote, with its stages in the order of training."""

    folder: Path
    stages: list[RunStage]

    @classmethod
    def read_folder(cls, folder: Path) -> "Run":
        """Read and check all configurations in a folder. Raises InputError."""
        needed = [name for name in STAGE_SCRIPTS if name not in OPTIONAL_STAGES]
        if missing := [f"{name}.yaml" for name in needed if not (folder / f"{name}.yaml").is_file()]:
            command = shlex.join(["t2i", "init", str(folder), "--data", "IMAGES"])
            raise InputError(f"{str(folder)!r} has no {', '.join(missing)}; `{command}` writes them")
        run = cls(folder, [read_stage(folder, name) for name in STAGE_SCRIPTS if (folder / f"{name}.yaml").is_file()])
        # Inputs that are missing or have changed
        run.check_stage_models()
        run.check_data_manifest()
        # The pipeline folder is replaced at the end, so it must be one
        if run.pipeline_folder.exists() and not (run.pipeline_folder / "model_index.json").is_file():
            raise InputError(f"{str(run.pipeline_folder)!r} is no pipeline and is not replaced; move it elsewhere")
        return run

    @property
    def pipeline_folder(self) -> Path:
        return self.folder / PIPELINE_NAME

    def __getitem__(self, name: str) -> Any:
        """Return the configuration of a stage."""
        return next(stage.config for stage in self.stages if stage.name == name)

    def check_stage_models(self) -> None:
        """Refuse a stage that needs a model of this folder which is not there, and which no stage will train."""
        names = [stage.name for stage in self.stages]
        for stage in self.stages:
            for model in OPTIONAL_STAGES:
                name = getattr(stage.config, model, None)
                in_folder = name is not None and Path(name).resolve() == (self.folder / model).resolve()
                if in_folder and model not in names and read_model_class(self.folder / model / "model") is None:
                    raise InputError(f"{stage.file} needs {name!r}, but {str(self.folder)!r} has no {model}.yaml")

    def check_data_manifest(self) -> None:
        """Refuse data without a manifest, and, before anything is trained, data that have changed since."""
        for path in sorted({stage.config.data.path for stage in self.stages}):
            open_manifest(path)
            if found := find_changes(path):
                what = f"{path!r} is not what was checked: {found}"
                if not any(stage.output.exists() for stage in self.stages):
                    raise InputError(f"{what}; `t2i data check {shlex.quote(path)}` reads it again")
                print_note(f"warning: {what}; training goes on with what was checked")

    def hash_inputs(self, stage: RunStage | None) -> str:
        """Return a hash of all files that a stage depends on; None stands for the pipeline."""
        before = self.stages[: self.stages.index(stage)] if stage else self.stages
        files = [path for earlier in before for path in earlier.find_result_files()]
        if stage:
            files += [stage.file, find_manifest(Path(stage.config.data.path))]
        return hash_files(files)


def read_stage(folder: Path, name: str) -> RunStage:
    """Read a stage's configuration. Raises InputError if it would write anywhere but to its place in the folder."""
    script, file = import_module(f"t2i.training.{STAGE_SCRIPTS[name]}"), folder / f"{name}.yaml"
    config = load_config(script.Config, name, [str(file)])
    output = config.output if name == "cache" else config.train.output
    if Path(output).resolve() != (folder / name).resolve():
        remedy = "run this where `t2i init` was run, or change the output"
        place = f"{str(folder / name)!r}, relative to the present folder"
        raise InputError(f"{file} writes to {output!r}, which is not {place}; {remedy}")
    return RunStage(name, Path(str(script.__file__)), file, config, folder / name)


def find_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def find_model_files(folder: Path) -> list[Path]:
    """Return the files of a pipeline, without its card, which people edit."""
    return [path for path in find_files(folder) if path.name != CARD_FILE]


def hash_files(files: list[Path]) -> str:
    """Return a hash of the names and contents of files; a missing file changes it too."""
    hasher = hashlib.sha256()
    for path in files:
        hasher.update(f"{path.name} {compute_file_sha256(path) if path.is_file() else 'missing'}\n".encode())
    return hasher.hexdigest()


class Trainer:
    """Runs the stages one by one, and passes SIGTERM, SIGHUP and Ctrl-C on to the stage that runs."""

    def __init__(self, run: Run, num_processes: int = 1, max_restarts: int = 0):
        self.run, self.num_processes, self.max_restarts = run, num_processes, max_restarts
        self.child: subprocess.Popen | None = None
        self.signal = 0

    def train(self) -> int:
        """Run the stages that are not done, and assemble the pipeline.

        Returns the exit status: 0, or that of the stage that failed or was stopped.
        """
        handlers = {number: signal.signal(number, self.forward_signal) for number in STOP_SIGNALS}
        try:
            return self.train_stages() or self.assemble_pipeline()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def train_stages(self) -> int:
        for stage in self.run.stages:
            inputs = self.run.hash_inputs(stage)
            if self.is_stage_done(stage.name, inputs, stage.find_result_files()):
                self.print_stage_status(stage.name, f"done, {stage.output}")
                continue
            self.print_stage_status(stage.name, stage.task_description)
            if status := self.run_stage(stage):
                return status
            self.record_stage_done(stage.name, inputs, stage.find_result_files())
        return 0

    def assemble_pipeline(self) -> int:
        """Write the pipeline folder, whole or not at all, if a stage has changed. Returns the exit status, 0."""
        folder, inputs = self.run.pipeline_folder, self.run.hash_inputs(None)
        if self.is_stage_done(PIPELINE_NAME, inputs, find_model_files(folder)):
            self.print_stage_status(PIPELINE_NAME, f"done, {folder}")
        else:
            self.print_stage_status(PIPELINE_NAME, f"assembles the stages in {folder}")
            # The decoder's configuration names the models that were not trained here
            decoder = self.run["decoder"]
            write_pipeline_folder(self.run.folder, folder, clip=decoder.clip, autoencoder=decoder.autoencoder)
            self.record_stage_done(PIPELINE_NAME, inputs, find_model_files(folder))
        # A command to draw with, for the first caption of the data
        example = next(open_manifest(self.run["prior"].data.path).iterate_rows("captions"))
        caption = shlex.quote(sanitize_text(example["captions"][0]))
        print_note(f"draw: t2i generate {caption} --model {shlex.quote(str(folder))}")
        return 0

    def estimate_costs(self) -> int:
        """Print the cost of each stage whose inputs are there; nothing is written. Returns the exit status."""
        # Trial steps need the images or the cache. A cache that is not there needs trained models.
        cached = (self.run.folder / "cache" / "cache.json").is_file()
        for stage in self.run.stages:
            is_tried = stage.name in OPTIONAL_STAGES or (cached and stage.name != "cache")
            note = "" if is_tried or stage.name == "cache" else "; its cost is known once the cache is made"
            self.print_stage_status(stage.name, f"{stage.task_description}{note}")
            if is_tried:
                overrides = ["train.dry_run=true"]
                # Without a trained prior, the decoder's previews have no row of it
                if stage.name == "decoder" and read_model_class(self.run.folder / "prior" / "model") is None:
                    overrides.append("sample.prior=null")
                if status := self.run_stage(stage, *overrides):
                    return status
        return 0

    def run_stage(self, stage: RunStage, *overrides: str) -> int:
        """Run a stage's script to its end, and return its exit status. Raises RunError if a signal ended it."""
        script = [str(stage.script), str(stage.file), *overrides]
        if self.num_processes > 1:
            command = build_torchrun_command(script, self.num_processes, self.max_restarts)
        else:
            command = [sys.executable, *script]
        # In a process group of its own, a terminal's Ctrl-C reaches the script once, from here.
        self.child = subprocess.Popen(command, process_group=0)
        if self.signal:  # it arrived while the process started
            self.child.send_signal(self.signal)
        status = self.child.wait()
        # After a signal these statuses mean "stopped": the script may have ended before it, cache_data catches no
        # signal, and torchrun reports 1.
        if self.signal and (status <= 0 or self.num_processes > 1):
            return 128 + signal.SIGINT if self.signal == signal.SIGINT else RESUMABLE_STATUS
        if status < 0:
            name = signal.Signals(-status).name
            raise RunError(
                f"{stage.name} was ended by {name}, by hand or for lack of memory; run the same command again"
            )
        return status

    def forward_signal(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to the stage that runs; SIGHUP as SIGTERM."""
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
        names = [*(stage.name for stage in self.run.stages), PIPELINE_NAME]
        print_note(f"{names.index(name) + 1}/{len(names)} {name}: {what}")
