"""From PubMed Central figure URLs to benchmarked medical vision-language models. Research use only."""

__version__ = "0.1.0"

RESEARCH_USE_ONLY = "Research use only. Not a medical device; never use it for clinical decisions."

__all__ = ["RESEARCH_USE_ONLY", "__version__"]
