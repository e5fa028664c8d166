"""The model card of an assembled pipeline, README.md: what is known of the model, its data and its training."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from t2i.pipelines.base import UnCLIPPipeline

import t2i
from t2i.data.manifest import STATUS_OK, find_manifest
from t2i.data.report import sanitize_text
from t2i.errors import InputError
from t2i.files.publishing import CARD_FILE, CARD_NAME
from t2i.files.untrusted import is_folder, read_json

UNKNOWN_LICENSE = "unknown"  # a name that the hub knows
SHOWN_CAPTION = 60  # characters of the example
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Rows of metrics.jsonl have these beside the stage's own metrics
COMMON_METRICS = ("step", "learning_rate", "gradient_norm", "samples_per_second", "memory_gb", "seconds_left")

CARD = """\
---
{front_matter}---

# {title}

A text-to-image model of the unCLIP kind (CLIP, prior, decoder) for images of {size} x {size} pixels, with {parameters}
parameters, by t2i {version}.

```python
from t2i import Text2ImagePipeline

pipeline = Text2ImagePipeline.from_pretrained("{name}")
pipeline({caption}).images[0].save("image.png")
```

diffusers alone loads it too, where the package t2i is installed:

```python
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

pipeline = DiffusionPipeline.from_pretrained(snapshot_download("{name}"), trust_remote_code=True)
```

## Data

{data}

## Training

{training}

## Limits

Not written down yet: what the model draws well, what it draws badly, and what it must not be used for.
"""


@dataclass(frozen=True)
class CardFacts:
    """Facts of a model that only a person knows.

    license: the hub's name of a licence, such as "apache-2.0". datasets: names on the hub.
    """

    license: str = UNKNOWN_LICENSE
    datasets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            allowed = "the hub's name of a licence, such as apache-2.0, or unknown"
            raise InputError(f"license must be {allowed}, got {self.license!r:.80}")
        for name in self.datasets:
            if not HUB_NAME.fullmatch(name):
                raise InputError(f"a dataset must be an ORGANISATION/NAME on the hub, got {name!r:.80}")


@dataclass(frozen=True)
class StageRecord:
    """Record of a stage's training: what is left of it, or nothing if the stage was taken from elsewhere.

    steps: None if it is not known. samples: of a step. settings: the stage's configuration. metrics: the last of each.
    """

    steps: int | None = None
    samples: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read_folder(cls, folder: Path) -> "StageRecord":
        """Read the log and the newest checkpoint of a run, of which either may have been deleted."""
        log, metrics = folder / "metrics.jsonl", dict[str, Any]()
        for line in log.read_text().splitlines() if log.is_file() else ():
            with suppress(ValueError):  # a line that a killed process did not finish
                metrics |= json.loads(line)
        checkpoints = sorted(folder.glob("checkpoints/step-*[0-9]/state.json"))
        state = read_json(checkpoints[-1]) if checkpoints else {}
        return cls(
            state.get("step", metrics.get("step")),
            state.get("samples_per_step"),
            state.get("stage", {}),
            {key: one for key, one in metrics.items() if key not in COMMON_METRICS and isinstance(one, int | float)},
        )


def write_model_card(
    folder: Path, title: str, pipeline: UnCLIPPipeline, stages: Mapping[str, str | Path], facts: CardFacts
) -> None:
    """Write README.md into a pipeline's folder.

    title: heading. stages: by stage, the folder of its run, or the name of a public model. No path of this machine is
    written.
    """
    records = {stage: StageRecord.read_folder(Path(place)) for stage, place in stages.items() if is_folder(Path(place))}
    data, caption, known = describe_data(records)
    datasets = list(dict.fromkeys([*facts.datasets, *known]))
    # Public models that parts were taken from, or trained from
    sources = [str(place) for stage, place in stages.items() if stage not in records]
    for record in records.values():
        sources += [str(record.settings.get(key)) for key in ("init", "text_encoder")]
    # A folder of this machine may be gone, but hardly the folder that it was in
    public = list(
        dict.fromkeys(name for name in sources if HUB_NAME.fullmatch(name) and not Path(name).parent.exists())
    )
    front = {
        "license": facts.license,
        "library_name": "t2i",
        "pipeline_tag": "text-to-image",
        "tags": ["unclip", "text-to-image"],
        **({"datasets": datasets} if datasets else {}),
        **({"base_model": public} if public else {}),
    }
    text = CARD.format(
        front_matter=yaml.safe_dump(front, sort_keys=False),
        title=title,
        size=pipeline.image_size,
        parameters=format_count(sum(map(count_parameters, pipeline.components.values()))),
        version=t2i.__version__,
        name=CARD_NAME,
        caption=json.dumps(caption, ensure_ascii=False),
        data=data,
        training=describe_training(pipeline, stages, records),
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def describe_data(records: Mapping[str, StageRecord]) -> tuple[str, str, list[str]]:
    """Return a paragraph on the data, a caption to draw, and names of datasets on the hub."""
    paths = [record.settings.get("data", {}).get("path") for record in records.values()]
    for path in dict.fromkeys(path for path in paths if path):
        try:
            manifest = find_manifest(Path(path))
            report = json.loads(manifest.with_name("report.json").read_text("utf-8"))
        except (InputError, OSError, ValueError):
            continue  # it was moved since
        rows = (row for batch in pq.ParquetFile(manifest).iter_batches(1024) for row in batch.to_pylist())
        example = next((row["captions"][0] for row in rows if row["captions"] and row["status"] == STATUS_OK), "")
        source = str(report["source"])
        is_public = source.startswith("hub:")
        name = source.removeprefix("hub:") if is_public else Path(source).name
        counts = f"{report['train']:,} images to train on and {report['held_out']:,} held out"
        left_out = f"{report['indexed'] - report['ok']:,} samples were left out"
        text = f"`{name}`: {counts}, with {report['captions']:,} captions. {left_out}."
        return text, sanitize_text(example)[:SHOWN_CAPTION] or "a cat", [name] if is_public else []
    return "Not known.", "a cat", []


def describe_training(
    pipeline: UnCLIPPipeline, stages: Mapping[str, str | Path], records: Mapping[str, StageRecord]
) -> str:
    """Return a table with a row for each stage: what it is, its size, its steps and its last metrics."""
    lines = ["| stage | class | parameters | steps x samples | last metrics |", "|---|---|---|---|---|"]
    for stage, place in stages.items():
        model, record = getattr(pipeline, stage), records.get(stage, StageRecord())
        if model is None:
            continue
        if record.steps is None:
            steps = "taken over" if stage in records else f"taken from `{place}`"
        else:
            steps = f"{record.steps:,} x {'unknown' if record.samples is None else f'{record.samples:,}'}"
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
        cells = [stage, type(model).__name__, format_count(count_parameters(model)), steps, metrics]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def count_parameters(component: Any) -> int:
    return sum(one.numel() for one in component.parameters()) if isinstance(component, torch.nn.Module) else 0


def format_count(count: int) -> str:
    """Return a number of parameters to a tenth of a million, or whole below that."""
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"
