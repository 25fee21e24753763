#!/usr/bin/env python
"""Pretrain a classifier on ImageNet or other labeled images, and write its Detectron2 backbone."""

from refbn_d2.pretrain.__main__ import main

if __name__ == "__main__":
    main()
