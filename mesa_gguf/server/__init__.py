"""``mesa-gguf serve``: OpenAI's API for one model and the documents of a library, and a page in the browser."""
