"""Figures, samples and benchmark items: from published files to Parquet shards."""
