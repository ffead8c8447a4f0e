"""The command `finetune`, also installed as the kubectl plugin `kubectl finetune`.

It sits on top of everything else: manifests through finetune_api, training as the trainer's own process, predictions through
finetune_trainer.inference. Libraries load inside the commands that need them, so that `finetune --help` answers at once.
"""
