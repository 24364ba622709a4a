"""What runs on a worker: prompt, engine, decode, score."""
