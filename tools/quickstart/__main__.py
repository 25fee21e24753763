#!/usr/bin/env python
"""Compare five norms in Mask R-CNN, trained on two similar images per step, and write a report."""

from refbn_d2.quickstart.__main__ import main

if __name__ == "__main__":
    main()
