#!/usr/bin/env python
"""Compare the speed of RefBN, RefIN and GroupNorm with nn.BatchNorm2d, forward and backward."""

from refbn_d2.study.benchmark import main

if __name__ == "__main__":
    main()
