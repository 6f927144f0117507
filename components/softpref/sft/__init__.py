"""Stage 2, SFT: the reference model."""
