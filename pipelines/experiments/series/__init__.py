"""Series of experiments: several recipes with several seeds, their results as tables, and what follows from them."""
