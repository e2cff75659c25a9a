# SPDX-License-Identifier: Apache-2.0
"""Examples: what recurrent networks are used for, each with its data, in a minute, with a figure and a picture.

Run one with `python -m fusedrnn.examples.NAME`; `--help` says what it does, `--quick` is a smoke run of seconds.
`pip install "fusedrnn[examples]"` brings what they need: matplotlib, scikit-learn, statsmodels.

NAME              kind                      what it learns
forecast          many-to-one               the CO2 in the air in the next year, from the three before
digits            many-to-one               handwritten digits, read row by row
dates             encoder-decoder           to write dates, as people write them in six ways, as 1974-03-05
caption           one-to-many               to write a caption for the image of a digit, letter by letter
ctc               alignment unknown         to read a line of digits, without being told where they stand
depth             layers and directions     the digits, by one to four layers in one direction or both
gradient_flow     what can be learned       the digits, pixel by pixel: how far back gradients reach
training_methods  BPTT, TBPTT, RTRL         the digits, by each of them in one training loop

Many-to-many, with truncated backpropagation and checkpoints: `python -m fusedrnn demo`, a character language model.
"""

NAMES = ("forecast", "digits", "dates", "caption", "ctc", "depth", "gradient_flow", "training_methods")
