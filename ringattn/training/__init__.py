"""The supporting parts of `launch/train.py`: a model, its data, what a run shows and writes.

The trainer is where to start reading; what sharding asks of a training loop is all in there.
"""
