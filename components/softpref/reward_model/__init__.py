"""`softpref judge`: a reward model, trained on preferences that the policy never sees."""
