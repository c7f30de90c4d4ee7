"""A page that transcribes speech: record or upload, read the transcript, give feedback.

    python app.py                     the newest finished run, or the base model
    python app.py --model runs/tour/train-…/model        or MODEL_URI=hub://owner/name
    python app.py --dry-run           print which model would be served

The code is in pipelines/inference/app/. Importing this file has no side effects.
"""

from pipelines.inference.app.launch import build, launch, main

__all__ = ["build", "launch", "main"]

if __name__ == "__main__":
    main()
