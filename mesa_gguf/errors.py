"""What can go wrong, in the user's words. Each message names the cause and what to do."""

from __future__ import annotations


class MesaError(Exception):
    """Base of all errors that mesa-gguf raises on purpose."""


class ModelError(MesaError, ValueError):
    """The model file cannot be used: missing, damaged, not GGUF, or of an unsupported architecture."""


class ConfigError(MesaError, ValueError):
    """A MesaConfig or MesaPlan that cannot work."""


class PromptError(MesaError, ValueError):
    """A text that cannot be read: empty, in a wrong encoding, or longer than n_ctx."""


class DeviceError(MesaError, ConnectionError):
    """A server that computes for this process cannot be reached, or has gone away."""


class OutOfMemoryError(MesaError, MemoryError):
    """Weights and KV cache do not fit into memory."""
