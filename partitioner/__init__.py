"""Where to cut: pairs into shards that share prefixes."""
