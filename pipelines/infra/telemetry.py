"""Switch off the usage reports of all dependencies.

They read environment variables when they are imported, some also in the processes that they start. `pipelines/__init__`
calls `switch_off` for this reason: every command, notebook, app and worker process imports the package first.
"""

from __future__ import annotations

import os

VARIABLES = {
    "DO_NOT_TRACK": "1",  # several read it: donottrack.sh
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime: writes a device id below the user's cache folder
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub; also transformers, datasets, gradio's and trackio's use of it
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets, evaluate
    "GRADIO_ANALYTICS_ENABLED": "False",  # Gradio compares with "True"
    "RAY_USAGE_STATS_ENABLED": "0",
    "ENABLE_HOPSWORKS_USAGE": "false",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "NPM_CONFIG_UPDATE_NOTIFIER": "false",
}
"""Variable to the value that switches the report off."""


def switch_off() -> None:
    """Set VARIABLES in this process and those that it starts, except those that the user has set."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
