#!/usr/bin/env python
"""Train or evaluate a detector from a LazyConfig (.py). Needs Detectron2."""

from refbn_d2.engines.lazyconfig import main

if __name__ == "__main__":
    main()
