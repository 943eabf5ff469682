"""Training models on one's own data: text here, ordinary Hugging Face folders as the result."""
