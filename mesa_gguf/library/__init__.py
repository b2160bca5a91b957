"""Documents that are kept: their text, their chunks, and what models have read of them."""
