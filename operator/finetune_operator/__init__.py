"""The operator: watches FineTuneJob resources, runs trainer pods, reports back.

Layers, innermost first: domain (pure decisions), kube (port to the API server) and observe (metrics, events), control (the only
place where things happen). import-linter keeps the direction.
"""

from importlib.metadata import version

__version__ = version("finetune-operator")
