"""What the stages share of language models: loading, tokens, sampling, scoring."""
