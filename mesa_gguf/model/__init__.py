"""Model files: what is in them, what llama.cpp makes of them, what they need, and where they come from."""
