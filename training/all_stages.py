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

from t2i.pipelines.jobs.assemble import assemble

from t2i.config import load_config
from t2i.data.cache import read_json
from t2i.data.freshness import changes
from t2i.data.manifest import Manifest, find_manifest
from t2i.data.report import readable
from t2i.errors import RESUMABLE, InputError, RunError
from t2i.files.atomic import digest, new_folder, write_json
from t2i.files.model_folder import class_name
from t2i.runtime.launch import torchrun

SCRIPTS = {
    "clip": "train_clip",
    "autoencoder": "train_autoencoder",
    "cache": "cache_data",
    "prior": "train_prior",
    "decoder": "train_decoder",
}
OPTIONAL = ("clip", "autoencoder")  # where a public one is named
DONE = "done.json"  # by stage: what it was made from and what it left, as hashes
PIPELINE = "pipeline"
HANGUP = getattr(signal, "SIGHUP", None)  # a closed terminal; Windows has none
STOP = [number for number in (signal.SIGTERM, signal.SIGINT, HANGUP) if number is not None]


@dataclass(frozen=True)
class Step:
    """A stage of a run."""

    name: str
    script: Path
    file: Path  # its configuration, ...
    config: Any  # ... read
    output: Path

    @property
    def what(self) -> str:
        if self.name == "cache":
            return f"encodes every picture and caption into {self.output}"
        return f"{self.config.train.steps:,} steps into {self.output}"

    def results(self) -> list[Path]:
        """The files that later stages read."""
        if self.name == "cache":
            return [self.output / "cache.json"]  # it holds the hashes of the others
        return [path for part in ("model", "scheduler", "text_encoder") for path in files_below(self.output / part)]


@dataclass(frozen=True)
class Run:
    folder: Path
    steps: list[Step]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """The configurations in a folder, all of them before anything starts. Raises InputError."""
        needed = [name for name in SCRIPTS if name not in OPTIONAL]
        if missing := [f"{name}.yaml" for name in needed if not (folder / f"{name}.yaml").is_file()]:
            raise InputError(
                f"{str(folder)!r} has no {', '.join(missing)}; `t2i init {folder} --data PICTURES` writes them"
            )
        run = cls(folder, [read_step(folder, name) for name in SCRIPTS if (folder / f"{name}.yaml").is_file()])
        run.check_models()
        run.check_data()
        if run.pipeline.exists() and not (run.pipeline / "model_index.json").is_file():
            raise InputError(f"{str(run.pipeline)!r} is no pipeline and is not replaced; move it elsewhere")
        return run

    @property
    def pipeline(self) -> Path:
        return self.folder / PIPELINE

    def __getitem__(self, name: str) -> Any:
        """The configuration of a stage."""
        return next(step.config for step in self.steps if step.name == name)

    def check_models(self) -> None:
        """Refuse a stage that takes over a model which no stage here will make."""
        names = [step.name for step in self.steps]
        for step in self.steps:
            for model in OPTIONAL:
                wanted = getattr(step.config, model, None)
                here = wanted is not None and Path(wanted).resolve() == (self.folder / model).resolve()
                if here and model not in names and class_name(self.folder / model / "model") is None:
                    raise InputError(f"{step.file} wants {wanted!r}, but {str(self.folder)!r} has no {model}.yaml")

    def check_data(self) -> None:
        """Refuse data without a manifest; and, before anything is trained, with one that is out of date."""
        for path in sorted({step.config.data.path for step in self.steps}):
            Manifest(path)
            if found := changes(path):
                what = f"{path!r} is not what was checked: {found}"
                if not any(step.output.exists() for step in self.steps):
                    raise InputError(f"{what}; `t2i data check {path}` reads it again")
                print(f"warning: {what}; training goes on with what was checked", flush=True)

    def inputs(self, step: Step | None) -> str:
        """A hash of all that a stage depends on; None is the pipeline."""
        before = self.steps[: self.steps.index(step)] if step else self.steps
        files = [path for one in before for path in one.results()]
        if step:
            files += [step.file, find_manifest(Path(step.config.data.path))]
        return contents(files)

    def example(self) -> str:
        """A caption of the data."""
        return readable(next(Manifest(self["prior"].data.path).rows("captions"))["captions"][0])


def read_step(folder: Path, name: str) -> Step:
    script, file = import_module(f"t2i.training.{SCRIPTS[name]}"), folder / f"{name}.yaml"
    config = load_config(script.Config, name, [str(file)])
    output = config.output if name == "cache" else config.train.output
    if Path(output).resolve() != (folder / name).resolve():
        where = "run this where `t2i init` was run, or change it"
        raise InputError(f"{file} writes to {output!r}, which is not {str(folder / name)!r} seen from here; {where}")
    return Step(name, Path(str(script.__file__)), file, config, folder / name)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(files: list[Path]) -> str:
    """A hash of the names and contents of files, those that are missing included."""
    hasher = hashlib.sha256()
    for path in files:
        hasher.update(f"{path.name} {digest(path) if path.is_file() else 'missing'}\n".encode())
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
            number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        try:
            return self.train_steps() or self.assemble()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def train_steps(self) -> int:
        for step in self.run.steps:
            inputs = self.run.inputs(step)
            if self.is_done(step.name, inputs, step.results()):
                self.say(step.name, f"done, {step.output}")
                continue
            self.say(step.name, step.what)
            if status := self.start(step):
                return status
            self.note(step.name, inputs, step.results())
        return 0

    def assemble(self) -> int:
        """The pipeline folder, replaced whole if a stage has changed."""
        folder, inputs = self.run.pipeline, self.run.inputs(None)
        if self.is_done(PIPELINE, inputs, files_below(folder)):
            self.say(PIPELINE, f"done, {folder}")
        else:
            self.say(PIPELINE, f"puts the stages together in {folder}")
            decoder = self.run["decoder"]
            pipeline = assemble(self.run.folder, clip=decoder.clip, autoencoder=decoder.autoencoder)
            with new_folder(folder) as unfinished:
                pipeline.save_pretrained(unfinished)
            self.note(PIPELINE, inputs, files_below(folder))
        print(f"draw: t2i generate {shlex.quote(self.run.example())} --model {shlex.quote(str(folder))}", flush=True)
        return 0

    def estimate(self) -> int:
        """What each stage will cost, as far as the stages before it are there; nothing is written."""
        for step in self.run.steps:
            cached = (self.run.folder / "cache" / "cache.json").is_file()
            if step.name == "cache":
                self.say(step.name, step.what)
            elif step.name in OPTIONAL or cached:
                self.say(step.name, step.what)
                no_prior = step.name == "decoder" and class_name(self.run.folder / "prior" / "model") is None
                if status := self.start(step, "train.dry_run=true", *(["sample.prior=null"] if no_prior else [])):
                    return status
            else:
                self.say(step.name, f"{step.what}; its cost can be told when the cache is there")
        return 0

    def start(self, step: Step, *overrides: str) -> int:
        """Run a stage's script to its end; its exit status."""
        script = [str(step.script), str(step.file), *overrides]
        several = self.num_processes > 1
        command = torchrun(script, self.num_processes, self.max_restarts) if several else [sys.executable, *script]
        # A process group of its own: Ctrl-C in a terminal reaches it once, from here.
        self.child = subprocess.Popen(command, process_group=0)
        if self.signal:  # it came while the process started
            self.child.send_signal(self.signal)
        status = self.child.wait()
        if self.signal and (status <= 0 or several):  # it had ended; a cache does not catch it; torchrun says 1
            return 128 + signal.SIGINT if self.signal == signal.SIGINT else RESUMABLE
        if status < 0:
            name = signal.Signals(-status).name
            raise RunError(f"{step.name} was ended by {name}, by hand or for lack of memory; the same command goes on")
        return status

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on; a closed terminal asks to stop as SIGTERM does."""
        self.signal = signal.SIGTERM if number == HANGUP else number
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(self.signal)

    def is_done(self, name: str, inputs: str, results: list[Path]) -> bool:
        return bool(results) and self.notes().get(name) == [inputs, contents(results)]

    def note(self, name: str, inputs: str, results: list[Path]) -> None:
        write_json(self.run.folder / DONE, {**self.notes(), name: [inputs, contents(results)]})

    def notes(self) -> dict[str, Any]:
        path = self.run.folder / DONE
        return read_json(path) if path.is_file() else {}

    def say(self, name: str, what: str) -> None:
        names = [*(step.name for step in self.run.steps), PIPELINE]
        print(f"{names.index(name) + 1}/{len(names)} {name}: {what}", flush=True)
