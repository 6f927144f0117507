"""Judges: which of two completions is better. They see texts, never the model that wrote them."""
