"""From the trainer to every replica: one policy version, verified."""
