"""Nothing of the losses, the step or the recipe assumes that its tensors are on the CPU: see
stand_in_device.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "file", ["check_stand_in_device.py", "check_bfloat16.py", "check_loss_stage.py"]
)
def test_everything_runs_on_another_device(file: str) -> None:
    """In a process of its own, as the device is registered for a whole process."""
    checks = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(checks)]
    path = os.pathsep.join(filter(None, (str(checks.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-1000:]
