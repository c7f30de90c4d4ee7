"""Compare experiments on one test set.

lookup     find the reports of an experiment by name, and group them over training seeds
findings   score of each experiment and its difference to the baseline, over all clips and per slice
compare    `compare(names) -> Comparison`
validity   whether a model's training data shares anything with its test set
tables     the comparison as tables and text
"""
