"""Distributions of tiny models, exact by enumeration."""

from softpref.lm.scoring import score_sequences


def outcome_probabilities(model, prompt, length, *, stop):
    """Every completion of at most `length` tokens with its probability; `stop` is the token that ends one."""
    outcomes, open_prefixes = [], [()]
    for step in range(length):
        longer = [(*prefix, token) for prefix in open_prefixes for token in range(model.config.vocab_size)]
        closed = [c for c in longer if c[-1] == stop or step == length - 1]
        open_prefixes = [c for c in longer if c[-1] != stop]
        outcomes += closed
    logps = score_sequences(model, [(prompt, list(c)) for c in outcomes])
    return dict(zip(outcomes, logps.double().exp().tolist(), strict=True))
