"""The checks of the notebooks in notebooks/exercises: one module for each."""
