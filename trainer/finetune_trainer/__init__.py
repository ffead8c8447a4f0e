"""The fine-tuning core: reads a recipe, trains, checkpoints, reports. Knows no Kubernetes.

The same process runs in the pod and under `finetune run`; all its input is the environment (finetune_api.names).
"""
