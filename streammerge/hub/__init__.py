"""To the Hugging Face Hub. The client, huggingface_hub, is imported where a call needs it."""
