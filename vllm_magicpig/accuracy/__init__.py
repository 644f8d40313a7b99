"""Sparse attention methods in plain PyTorch, to measure what each costs in accuracy, on any device.

They read every row and mask afterwards, so their speed says nothing; the serving path imports none
of this.

    methods.py                 magicpig, signatures, Quest, oracles and the rest, one step of a layer
    transformers_attention.py  the methods as the attention function of a Hugging Face model
    tune_measure.py, tune_report.py  candidates for the options, measured and compared: tune.py
"""
