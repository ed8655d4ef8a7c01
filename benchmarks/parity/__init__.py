"""What `parity_mergekit.py` is made of: models, mergekit's environment, cases, comparisons, intended differences."""
