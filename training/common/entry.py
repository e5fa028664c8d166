"""The entry of every training script."""

import os
import sys
from collections.abc import Callable

from omegaconf import OmegaConf
from t2i.training.common.effects import warn_of_idle_settings

from t2i.config import load_config
from t2i.errors import report_errors
from t2i.runtime.launch import Config, count_forgotten_processes, end_process_group, exec_torchrun
from t2i.runtime.rank import ignore_leftover_ranks


def run(main: Callable[[Config], None], config_class: type[Config], stage: str, arguments: list[str]) -> None:
    """Read a script's configuration from the command line, and run its `main`."""
    count = count_forgotten_processes()
    if count > 1:  # start this script again, in all of them
        os.environ["ACCELERATE_USE_CPU"] = "true"
        exec_torchrun(sys.argv, count)
    with report_errors():
        start_training(main, load_config(config_class, stage, arguments))


def start_training(main: Callable[[Config], None], config: Config) -> None:
    """Run a stage's `main`; before a dry run, print the whole configuration."""
    ignore_leftover_ranks()
    training = getattr(config, "train", None)  # cache_data.py has none
    if os.environ.get("RANK", "0") == "0":
        if training is not None and training.dry_run:
            print(OmegaConf.to_yaml(OmegaConf.structured(config)).rstrip(), flush=True)
        warn_of_idle_settings(config)
    main(config)
    end_process_group()
