"""One module for each published source. Pure functions from files to records, and to what was dropped."""
