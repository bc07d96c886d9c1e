"""The parts of the demo trainer, `launch/train.py`: its options, model, data and run folder.

A training loop of your own needs none of this; `ringattn.training` has what it imports.
"""
