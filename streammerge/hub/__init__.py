"""The Hugging Face Hub: models from it, by byte ranges or through its client's cache, and merges to it."""
