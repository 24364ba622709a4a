"""Measurements against the bare engine, in one run on one machine; ratios, since machines are noisy."""
