#!/usr/bin/env python
"""Convert the checkpoint of a ResNet or a detector, or describe a file."""

from refbn_d2.export.__main__ import main

if __name__ == "__main__":
    main()
