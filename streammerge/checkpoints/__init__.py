"""Bytes in and out: safetensors headers, byte ranges, checkpoint folders, shards. Knows nothing of merging."""
