"""Find one part of a public model, such as its U-Net, by the name that a training configuration gives."""

import re
from dataclasses import dataclass
from pathlib import Path

from t2i.errors import InputError
from t2i.files.component import Component
from t2i.files.model_folder import read_model_class
from t2i.files.untrusted import is_folder
from t2i.interop.fetching import fetch_model_folder
from t2i.interop.folders import SourceFolder
from t2i.interop.layouts import LAYOUTS, PART_CLASSES, TRANSFORMERS_PARTS, WEIGHT_STEMS


@dataclass(frozen=True)
class PublicPart:
    """A part of a public model. part: its name in `t2i.interop.layouts`. folder: path of the part. source: the folder
    of its pipeline; for a part alone, that of the part."""

    part: str
    folder: Path
    source: SourceFolder

    @property
    def in_pipeline(self) -> bool:
        return self.source.pipeline_layout is not None

    def open_component(self, part: str | None = None) -> Component:
        """Return this part, or another of the same pipeline. Raises InputError if it is not there."""
        if part is None and not self.in_pipeline:
            return Component(self.folder, self.source.path, self.source.variant)
        return self.source.open_component(part or self.part)


def find_public_part(
    name: str, parts: tuple[str, ...], others: tuple[str, ...] = (), variant: str | None = None
) -> PublicPart | None:
    """Return the first of `parts` that the public model of this name has; None if the name is not a public model's.

    name: the folder of a pipeline, the folder of one of its parts, such as FOLDER/unet, or a repository on the hub.
    others: parts that are downloaded too, with all configurations. variant: suffix of the weight files. Raises
    InputError for a public pipeline without any of the parts, and for a name that is neither a folder nor on the hub.
    """
    if not is_folder(name) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is None:
        return None
    # Where the hub lists no files, all text is downloaded, and the folders of these parts in any layout.
    needed = (*parts, *others)
    places = {layout.part_folders[part] for layout in LAYOUTS for part in needed if part in layout.part_folders}
    files = [f"{stem}{end}.safetensors" for stem in WEIGHT_STEMS for end in ("", "-*")]
    patterns = ["*.json", "*.txt", *(f"{place}/{file}" for place in sorted(places - {"."}) for file in files)]
    path = fetch_model_folder(name, needed, variant, otherwise=patterns).absolute()
    return locate_public_part(SourceFolder(path, variant), parts, name)


def locate_public_part(source: SourceFolder, parts: tuple[str, ...], name: str | None = None) -> PublicPart | None:
    """Return the first of `parts` that a folder has, or is; None for other folders. `name` is for the message."""
    # The folder of a pipeline
    layout = source.pipeline_layout
    if layout is not None:
        for part in parts:
            if part in layout.part_folders:
                return PublicPart(part, source.path / layout.part_folders[part], source)
        title = f"{name or str(source.path)!r} is {layout.title} ({layout.name})"
        has = ", ".join(layout.part_folders.values())
        raise InputError(f"{title}: it holds {has}, and no {' or '.join(parts)}")
    # The folder of a part in a pipeline
    path = source.path.absolute()
    pipeline = SourceFolder(path.parent, source.variant)
    if pipeline.pipeline_layout is not None:
        for part in parts:
            if pipeline.pipeline_layout.part_folders.get(part) == path.name:
                return PublicPart(part, path, pipeline)
    # The folder of a part alone. Those of transformers are of no use without their tokenizer.
    class_name = read_model_class(path)
    for part in parts:
        if part not in TRANSFORMERS_PARTS and class_name in PART_CLASSES[part]:
            return PublicPart(part, path, source)
    return None
