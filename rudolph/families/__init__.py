"""Model families: the architectures that a run can train and evaluate."""
