"""Mix the weights of models: with their base model (WiSE-FT), of several runs (model soup), of a run's checkpoints."""
