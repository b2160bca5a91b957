"""Reading a document and answering questions about it."""
