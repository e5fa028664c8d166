"""Components of a pipeline, with one check wherever they enter: construction, loading, `from_pipe`, assignment."""

import json
from collections.abc import Collection, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from t2i.pipelines.calls.aliases import alias_component, resolve_aliases
from t2i.pipelines.calls.offload import DiskOffloading
from t2i.pipelines.folder import COMPONENT_CLASSES, SCHEDULED_MODELS, check_pairs, check_parts, check_schedules

import t2i
from t2i.diffusion.samplers import remember_training
from t2i.errors import InputError
from t2i.files.model_folder import hide_origins
from t2i.files.untrusted import DIFFUSERS_CODE

CODE_TEMPLATE = """\
# For diffusers: DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True). It needs the package t2i.

from t2i import {name}  # noqa: F401
"""


class CheckedPipeline(DiskOffloading):
    """Base of all pipelines: their components fit each other, whichever way they come in.

    component_aliases: diffusers' names of components, which are attributes and keyword arguments too.
    """

    component_aliases: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        for alias, name in cls.component_aliases.items():
            setattr(cls, alias, alias_component(alias, name))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. A component that replaces another is checked as in the constructor."""
        if name in COMPONENT_CLASSES and name in self.__dict__:
            self.register_modules(**{name: value})
        else:
            super().__setattr__(name, value)

    def register_modules(self, **components: Any) -> None:
        """Register components, by their names or diffusers', all at once or none.

        Raises InputError for those that do not fit the others. A model and its scheduler may replace others one after
        the other: a call checks them again.
        """
        components = resolve_aliases(components, self.component_aliases)
        before = {name: self.__dict__[name] for name in COMPONENT_CLASSES if name in self.__dict__}
        after = before | components
        check_parts(before, components, self._optional_components)
        if not before:
            check_pairs(after)
        check_schedules(before, components)
        # Taken out first: what is in the place of another would be checked again, one by one
        for name in components:
            self.__dict__.pop(name, None)
        super().register_modules(**components)

    def remember_training(self, given: Collection[str] = ()) -> None:
        """Note the scheduler of each model, as both were stored together. given: names of the caller's own parts."""
        for model in SCHEDULED_MODELS:
            scheduler = f"{model}_scheduler"
            if model not in given and scheduler not in given:
                remember_training(getattr(self, model, None), getattr(self, scheduler, None))

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """Save the pipeline as diffusers does, without the paths that its components were loaded from."""
        with hide_origins(self, *self.components.values()):
            super().save_pretrained(save_directory, *arguments, **options)

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write the index, and beside it the code by which diffusers' `DiffusionPipeline` finds this class."""
        super().to_json_file(json_file_path)
        path = Path(json_file_path)
        # A subclass of the user's is saved as what it is a kind of
        public = (base.__name__ for base in type(self).__mro__ if base.__name__ in t2i.__all__)
        if name := next(public, None):
            index = json.loads(path.read_text()) | {"_class_name": [Path(DIFFUSERS_CODE).stem, name]}
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            path.with_name(DIFFUSERS_CODE).write_text(CODE_TEMPLATE.format(name=name))

    @classmethod
    def list_component_names(cls) -> list[str]:
        """Return the names of the components that this pipeline has."""
        return [name for name in signature(cls.__init__).parameters if name in COMPONENT_CLASSES]

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **components: Any) -> Self:
        """Build this pipeline from the components of another one, which stay as they are; `components` replace some.

        dtype, or `torch_dtype`, converts the weights, which both pipelines then share; None keeps them. Raises
        InputError for components that the other pipeline does not have or that do not belong together.
        """
        # Check the arguments
        components = resolve_aliases(components, cls.component_aliases)
        older = components.pop("torch_dtype", None)
        dtype = components.pop("dtype", None) or older
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise InputError(f"dtype must be a torch.dtype, got {dtype!r:.80}")
        names = cls.list_component_names()
        if unknown := sorted(components.keys() - set(names)):
            raise InputError(f"{unknown[0]!r} is no component; they are {', '.join(names)}")
        shared = {name: part for name, part in pipeline.components.items() if name in names}
        for name in names:
            if name not in components and shared.get(name) is None and name not in cls._optional_components:
                raise InputError(f"this pipeline has no {name}, which {cls.__name__} needs; give {name}=...")

        # Build
        other = cls(**shared | components)
        if dtype is not None:
            other.to(dtype=dtype)
        other.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        other.adopt_settings(pipeline)
        return other
