"""The lineage: ingest → datasets → training → benchmarks, one file a group."""
