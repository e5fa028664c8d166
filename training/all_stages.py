"""From data to a pipeline: train every stage that a folder configures, one after the other, each in a process.

`t2i init` writes such a folder. The name of a configuration begins with the stage: `prior.yaml`, `prior-mlp.yaml`.
Each stage follows those whose results it reads. A stage is done if its configuration, the manifest, the results that it
reads and its own results are unchanged. Any other stage is run; its script continues from its checkpoint, or refuses
with a reason.
"""

import hashlib
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
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
    "upsampler": "train_upsampler",
    "classifier": "train_classifier",
}
NEEDED_STAGES = ("cache", "prior", "decoder")  # a trained or public model can take the place of the first two
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
    def makes_cache(self) -> bool:
        return self.script.stem == STAGE_SCRIPTS["cache"]

    @property
    def task_description(self) -> str:
        if self.makes_cache:
            return f"encodes every image and caption into {self.output}"
        return f"{self.config.train.steps:,} steps into {self.output}"

    def find_result_files(self) -> list[Path]:
        """Return the files that later stages read."""
        if self.makes_cache:
            return [self.output / "cache.json"]  # which contains the hashes of the other files
        return [path for part in ("model", "scheduler", "text_encoder") for path in find_files(self.output / part)]

    @property
    def is_there(self) -> bool:
        """Return whether it has results."""
        files = self.find_result_files()
        return bool(files) and all(path.is_file() for path in files)

    @property
    def input_folders(self) -> list[Path]:
        """Folders that the configuration names, such as `clip` and `init`; not those that only previews need."""
        # Only values of the first level: `sample.prior` serves previews, and a new one changes no result
        values = [getattr(self.config, item.name) for item in fields(self.config) if item.name != "output"]
        return [Path(value).resolve() for value in values if isinstance(value, str)]


@dataclass(frozen=True)
class Run:
    """The stages that a folder configures, in the order of training, and the folder of their results."""

    folder: Path  # of the configurations
    output: Path
    stages: list[RunStage]

    @classmethod
    def read_folder(cls, folder: Path, output: Path | None = None) -> "Run":
        """Read and check all configurations in a folder. Raises InputError.

        output: folder in which each stage has a folder of its name; by default that of the configurations.
        """
        if missing := [f"{name}.yaml" for name in NEEDED_STAGES if not (folder / f"{name}.yaml").is_file()]:
            command = shlex.join(["t2i", "init", str(folder), "--data", "IMAGES"])
            raise InputError(f"{str(folder)!r} has no {', '.join(missing)}; `{command}` writes them")
        output = folder if output is None else output
        run = cls(folder, output, sort_stages([read_stage(file, output) for file in sorted(folder.glob("*.yaml"))]))
        # Inputs that are missing or have changed
        run.check_stage_models()
        run.check_data_manifest()
        # The pipeline folder is replaced at the end, so it must be one
        if run.pipeline_folder.exists() and not (run.pipeline_folder / "model_index.json").is_file():
            raise InputError(f"{str(run.pipeline_folder)!r} is no pipeline and is not replaced; move it elsewhere")
        return run

    @property
    def pipeline_folder(self) -> Path:
        return self.output / PIPELINE_NAME

    def __getitem__(self, name: str) -> Any:
        """Return the configuration of a stage."""
        return next(stage.config for stage in self.stages if stage.name == name)

    def list_inputs(self, stage: RunStage) -> list[RunStage]:
        """Return the stages whose results a stage reads."""
        return [other for other in self.stages if other.output.resolve() in stage.input_folders]

    def check_stage_models(self) -> None:
        """Refuse a stage that needs a model in the output folder which is not there, and which no stage will train."""
        outputs = [stage.output.resolve() for stage in self.stages]
        for stage in self.stages:
            for model in stage.input_folders:
                in_output = model.parent == self.output.resolve() and model not in outputs
                if in_output and read_model_class(model / "model") is None:
                    missing = f"{str(self.folder)!r} has no {model.name}.yaml"
                    raise InputError(f"{stage.file} needs {str(self.output / model.name)!r}, but {missing}")

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
        inputs = self.list_inputs(stage) if stage else self.stages
        files = [path for earlier in inputs for path in earlier.find_result_files()]
        if stage:
            files += [stage.file, find_manifest(Path(stage.config.data.path))]
        return hash_files(files)


def read_stage(file: Path, run_output: Path) -> RunStage:
    """Read a stage's configuration. Raises InputError if it would write anywhere but to its place in the output."""
    kind = next((kind for kind in STAGE_SCRIPTS if file.stem == kind or file.stem.startswith(f"{kind}-")), None)
    if kind is None:
        raise InputError(f"{str(file)!r} is of no stage; its name must begin with one of {', '.join(STAGE_SCRIPTS)}")
    # The configuration is that of the script, whatever follows the stage in the file's name
    script = import_module(f"t2i.training.{STAGE_SCRIPTS[kind]}")
    config = load_config(script.Config, file.stem, [str(file)])
    output = config.output if kind == "cache" else config.train.output
    place = run_output / file.stem
    if Path(output).resolve() != place.resolve():
        remedy = "run this where `t2i init` was run, give --out, or change the output"
        where = f"{str(place)!r}, relative to the present folder"
        raise InputError(f"{file} writes to {output!r}, which is not {where}; {remedy}")
    return RunStage(file.stem, Path(str(script.__file__)), file, config, place)


def sort_stages(stages: list[RunStage]) -> list[RunStage]:
    """Return stages so that each follows those whose results it reads. Raises InputError for a circle."""
    kinds = list(STAGE_SCRIPTS.values())
    # Stages that read nothing of each other keep the order of their kinds
    waiting = sorted(stages, key=lambda stage: kinds.index(stage.script.stem))
    ordered: list[RunStage] = []
    while waiting:
        missing = {stage.output.resolve() for stage in waiting}
        ready = next((stage for stage in waiting if missing.isdisjoint(stage.input_folders)), None)
        if ready is None:
            raise InputError(f"{', '.join(str(stage.file) for stage in waiting)} read each other's results in a circle")
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


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
            write_pipeline_folder(self.run.output, folder, clip=decoder.clip, autoencoder=decoder.autoencoder)
            self.record_stage_done(PIPELINE_NAME, inputs, find_model_files(folder))
        # A command to draw with, for the first caption of the data
        example = next(open_manifest(self.run["prior"].data.path).iterate_rows("captions"))
        caption = shlex.quote(sanitize_text(example["captions"][0]))
        print_note(f"draw: t2i generate {caption} --model {shlex.quote(str(folder))}")
        return 0

    def estimate_costs(self) -> int:
        """Print the cost of each stage whose inputs are there; nothing is written. Returns the exit status."""
        for stage in self.run.stages:
            # Trial steps need the images or the cache, and the trained models
            missing = [other.name for other in self.run.list_inputs(stage) if not other.is_there]
            note = f"; its cost is known once {', '.join(missing)} is there" if missing else ""
            self.print_stage_status(stage.name, f"{stage.task_description}{note}")
            if missing or stage.makes_cache:
                continue
            overrides = ["train.dry_run=true"]
            # Without a trained prior, previews have no row of it
            prior = getattr(getattr(stage.config, "sample", None), "prior", None)
            if prior is not None and read_model_class(Path(prior) / "model") is None:
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
        write_json_file(self.run.output / DONE_FILE, {**self.read_done_stages(), name: [inputs, hash_files(results)]})

    def read_done_stages(self) -> dict[str, Any]:
        path = self.run.output / DONE_FILE
        return read_json(path) if path.is_file() else {}

    def print_stage_status(self, name: str, what: str) -> None:
        names = [*(stage.name for stage in self.run.stages), PIPELINE_NAME]
        print_note(f"{names.index(name) + 1}/{len(names)} {name}: {what}")
