"""The diagonal Fisher information of a base model: the only place that builds a transformers model."""
