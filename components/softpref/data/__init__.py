"""Stage 1, data: sources become checked preference rows on disk."""
