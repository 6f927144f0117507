"""Imported in a launched process: in the third step, when first computed, the second one's loss is NaN."""

import os

from softpref.spo.trainer import SPOTrainer

compute_loss = SPOTrainer.compute_loss


def poisoned(self, model, inputs, *args, **options):
    loss = compute_loss(self, model, inputs, *args, **options)
    first = self.state.global_step == 2 and self._suspect is None
    return loss * float("nan") if first and os.environ["RANK"] == "1" else loss


SPOTrainer.compute_loss = poisoned
