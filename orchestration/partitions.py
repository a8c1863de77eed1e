"""The partitions: parts of the URL list, recipes, and recipes by benchmark."""

import dagster as dg

from medvlm.config import recipe_names
from medvlm.settings import BENCHMARKS

recipes = dg.StaticPartitionsDefinition(recipe_names())
"""Every recipe that ships; one runs only if params.yaml lists it."""

evaluations = dg.MultiPartitionsDefinition(
    {"recipe": recipes, "benchmark": dg.StaticPartitionsDefinition(list(BENCHMARKS))}
)

PARTS = 16
list_parts = dg.StaticPartitionsDefinition([f"{part}-of-{PARTS}" for part in range(1, PARTS + 1)])
"""Parts of the URL list, such as ``3-of-16``: about 45,000 rows each of LLaVA-Med's list."""
