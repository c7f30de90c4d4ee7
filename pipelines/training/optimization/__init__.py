"""What a recipe decides about the optimisation: optimizer and its groups of weights, learning rates, precision."""
