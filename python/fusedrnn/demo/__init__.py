# SPDX-License-Identifier: Apache-2.0
"""`python -m fusedrnn demo`: a character language model learns to write English on this machine, in under two minutes.

text.py        the text, its characters as numbers, rows to train on
model.py       embedding, RNN/LSTM/GRU, softmax and its gradient
adam.py        the optimizer
options.py     what is computed, how far it is, and what these values may be
train.py       the loop: truncated BPTT, clipping, evaluation, checkpoints
checkpoint.py  a checkpoint read, and checked before a model is made of it
display.py     progress bar, the curve's picture
cli.py         options and what happens in which order
"""
