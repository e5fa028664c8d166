"""What a command imports before it draws."""

import subprocess
import sys

NEEDLESS = (
    "pyarrow",
    "t2i.training",
    "training",
    "t2i.training.common.loop",
    "t2i.data.dataset",
    "transformers.models.t5.modeling_t5",
    "datasets",
)


def test_drawing_imports_no_training_and_leaves_the_collector_as_it_was():
    code = f"""
import gc, sys
from t2i.commands import speed_up_imports
with speed_up_imports():
    import t2i.pipelines.jobs.generation
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert 'torch' in sys.modules
found = [name for name in {NEEDLESS} if name in sys.modules]
assert not found, found
with speed_up_imports():  # torch is there already: nothing is to be gained
    assert gc.isenabled()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
