"""Data: manifests, shards, plans, batches; corpora that others published and one that is synthesized."""
