"""Sparse attention methods in plain PyTorch, to measure what each costs in accuracy, on any device.

They read every row and mask afterwards, so their speed says nothing; the serving path imports none
of this.

    methods.py                 magicpig, Quest, the oracles and the rest, one decode step of a layer
    transformers_attention.py  the methods as the attention function of a Hugging Face model
    estimators.py              candidates for magicpig's next estimator, over captured q, k and v
"""
