# SPDX-License-Identifier: Apache-2.0
"""python -m fusedrnn.examples: the list of examples."""

from fusedrnn import examples

if __name__ == "__main__":
    print(examples.__doc__)
