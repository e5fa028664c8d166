"""Entry."""

import os
import sys
from collections.abc import Callable

from t2i.config import as_yaml, load_config
from t2i.errors import reported
from t2i.runtime.launch import Config, become, end_group, forgotten_processes


def run(main: Callable[[Config], None], config_class: type[Config], stage: str, arguments: list[str]) -> None:
    """What a script does when it is executed: read its configuration from the command line and train."""
    if (count := forgotten_processes()) > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        become(sys.argv, count)
    with reported():
        begin(main, load_config(config_class, stage, arguments))


def begin(main: Callable[[Config], None], config: Config) -> None:
    """Train; of a dry run, show the whole configuration first."""
    training = getattr(config, "train", None)  # making a cache has none
    if training is not None and training.dry_run and os.environ.get("RANK", "0") == "0":
        print(as_yaml(config), flush=True)
    main(config)
    end_group()
