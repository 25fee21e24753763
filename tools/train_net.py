#!/usr/bin/env python
"""Train or evaluate a detector from a Detectron2 config."""

from refbn_d2.engines.__main__ import main

if __name__ == "__main__":
    main()
