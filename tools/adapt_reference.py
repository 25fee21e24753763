#!/usr/bin/env python
"""Adapt a trained RefBN or RefIN detector to a new camera, by its unlabeled pictures."""

from refbn_d2.engines.adapt import main

if __name__ == "__main__":
    main()
