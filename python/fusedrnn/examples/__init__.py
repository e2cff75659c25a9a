# SPDX-License-Identifier: Apache-2.0
"""Examples: what recurrent networks are used for, each with its data, in a minute, with a figure and a picture.

Run one with `python -m fusedrnn.examples.NAME`; `--help` says what it does, `--quick` is a smoke run of seconds.
`pip install "fusedrnn[examples]"` brings what they need: matplotlib, scikit-learn, statsmodels.

NAME              kind                      what it learns                                       reached (naive), seed 0
forecast          many-to-one               next year's CO2 in the air, from three years         0.48 ppm off (0.61)
digits            many-to-one               handwritten digits, read row by row                  98.6 % right (13.1)
dates             encoder-decoder           to write dates, written in six ways, as 1974-03-05   99.3 % right (0)
caption           one-to-many               to caption the image of a digit, letter by letter    91.9 % right (3.6)
ctc               alignment unknown         to read lines of digits, not told where they stand   5.3 % wrong (34.5)
depth             layers and directions     the digits, by 1 to 4 layers in one direction or both
gradient_flow     what can be learned       the digits, pixel by pixel: how far back gradients reach
training_methods  BPTT, TBPTT, RTRL         the digits, by each of them in one training loop

Many-to-many, with truncated backpropagation and checkpoints: `python -m fusedrnn demo`, a character language model.
"""

NAMES = ("forecast", "digits", "dates", "caption", "ctc", "depth", "gradient_flow", "training_methods")
