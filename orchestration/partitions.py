"""The partitions: one for each recipe, one for each recipe and benchmark."""

import dagster as dg

from medvlm.config import recipe_names
from medvlm.settings import BENCHMARKS

recipes = dg.StaticPartitionsDefinition(recipe_names())
"""Every recipe that ships; one runs only if params.yaml lists it."""

evaluations = dg.MultiPartitionsDefinition(
    {"recipe": recipes, "benchmark": dg.StaticPartitionsDefinition(list(BENCHMARKS))}
)
