"""What runs on a worker: prompt, engine, decode, score."""

import os

# Nothing calls home: vLLM, transformers and TRL do unless told not to, and ask but once, where huggingface_hub is first
# imported. That is behind this line in every process.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
