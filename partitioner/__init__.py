"""Where to cut: pairs into shards that share prefixes, a night into waves, probability into tiers."""
