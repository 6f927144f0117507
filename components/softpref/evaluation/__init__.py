"""Stage 4, evaluation: figures with intervals, the report, the comparison of a sweep."""
