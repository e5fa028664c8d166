"""What a fault test did: a line in the file named by T2I_FAULTS, from which `make faults` makes its table."""

import json
import os


def record(fault: str, injected: int, survived: int) -> None:
    """Assert that a fault was injected at all and was survived every time."""
    path = os.environ.get("T2I_FAULTS")
    if path:
        line = json.dumps({"fault": fault, "injected": injected, "survived": survived})
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    assert injected > 0, f"{fault}: never injected"
    assert survived == injected, f"{fault}: survived {survived} of {injected}"
