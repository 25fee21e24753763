#!/usr/bin/env python
"""Pretrain a backbone with RefBN and with BN, convert it, fine-tune Mask R-CNN, write a report."""

from refbn_d2.quickstart.__main__ import main

if __name__ == "__main__":
    main()
