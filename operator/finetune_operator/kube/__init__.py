"""The narrow port to the API server (a Protocol) and its kubernetes.aio adapter."""
