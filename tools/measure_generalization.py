#!/usr/bin/env python
"""Measure what a norm does for generalization: run a study, and write its tables and report."""

from refbn_d2.study.__main__ import main

if __name__ == "__main__":
    main()
