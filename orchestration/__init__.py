"""The pipeline in Dagster: assets, checks, jobs and schedules. It only wires; `medvlm` does the work."""
